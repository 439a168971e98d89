"""What figures depend on, so that none are taken for those of other settings."""

from dataclasses import asdict
from typing import Any

from answers import digest_of_images
from runs import REFERENCE, Run
from settings import Settings

FREE = ("epochs", "answers", "batch_size", "learning_rate")
"""Settings that each run has of its own."""


def recorded(settings: Settings) -> dict[str, Any]:
    """All of it, as JSON."""
    found = asdict(settings)
    for elsewhere in ("folder", "data_dir", "processes"):
        del found[elsewhere]
    found["reference"] = settings.reference.name if settings.reference else None
    return {**found, "images": digest_of_images(settings.data_dir)}


def unlike(run: Run, settings: Settings, before: dict[str, Any]) -> list[str]:
    """How what was recorded ``before`` for ``run`` differs from ``settings``.

    How long, how fast and in which batches is no difference: a student may be trained in another
    way than what teaches it.
    """
    now = recorded(settings)
    keys = set(now) - {*FREE, "device"}
    if run == REFERENCE and settings.reference:
        keys = {"reference", "reference_epochs", "images", "held_out"}
    return [
        f"{key}={before.get(key)}, now {now[key]}"
        for key in sorted(keys)
        if before.get(key) != now[key]
    ]
