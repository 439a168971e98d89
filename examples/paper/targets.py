"""What was to be reached, what was, and how much is missing."""

import math
import statistics

from figures import Figures, Results, accuracies, mean, speed
from runs import (
    COMBINED,
    FACTORIZED_BY_THREE,
    FACTORIZED_BY_TWO,
    PRUNED_BY_THREE,
    PRUNED_BY_TWO,
    STUDENTS,
    Run,
    again,
    pruned,
)
from settings import BATCHES

TARGETS: list[tuple[str, tuple[Run, ...], str, dict[str, float]]] = [
    (
        "gradual, 75 %",
        (again(PRUNED_BY_THREE[0.75]), PRUNED_BY_TWO[0.75]),
        "float32",
        {"points": 0},
    ),
    (
        "gradual, 87.5 %",
        (pruned(0.875, scope="global", distilled=True), PRUNED_BY_TWO[0.875]),
        "float32",
        {"points": -0.3},
    ),
    (
        "gradual, 95 %",
        (again(PRUNED_BY_THREE[0.95]), PRUNED_BY_TWO[0.95]),
        "float32",
        {"points": -0.5},
    ),
    (
        "low rank, the paper's ranks",
        (again(again(FACTORIZED_BY_THREE)), FACTORIZED_BY_TWO),
        "float32",
        {"points": 0, "times fewer bytes": 1 / 0.41, "times as fast at batch 64": 1.8},
    ),
    (
        "combined, first step",
        COMBINED,
        "int6",
        {"times fewer bytes": 200, "% of the accuracy": 98, "times as fast at batch 1": 5},
    ),
    (
        "combined, the goal",
        COMBINED,
        "int6",
        {
            "times fewer bytes": 500,
            "% of the accuracy": 99,
            "times as fast at batch 1": 20,
            "times as fast at batch 64": 10,
        },
    ),
]
"""What was to be reached at least, by the first of these runs that there is, in which form."""


SEEDS = 3  # the least that a spread is taken of
BATCH = "times as fast at batch"


def measures(results: Results, figures: Figures, form: str) -> dict[str, float]:
    """What targets are about, relative to the dense network."""
    own = mean(accuracies(figures, form))
    bytes_ = mean(one["files"][form]["bytes"] for one in figures)
    return {
        "points": 100 * (own - results.reference),
        "% of the accuracy": 100 * results.relative(figures, form),
        "times fewer bytes": figures[0]["dense_bytes"] / bytes_,
        **{f"{BATCH} {batch}": speed(figures, batch) for batch in BATCHES},
    }


def targets(results: Results) -> str:
    """A table of all targets."""
    rows = [
        ("", "to reach", "here", "epochs, seeds", "missing"),
        ("---",) * 5,
        *(_of_methods(results, *target) for target in TARGETS),
        *(_of_student(results, name) for name in STUDENTS),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _of_methods(
    results: Results, title: str, runs: tuple[Run, ...], form: str, wanted: dict[str, float]
) -> tuple[str, ...]:
    run = results.first(runs)
    if run is None:
        return title, _spelled(wanted), "not trained", "-", "all"
    figures = results.of(run)
    found = measures(results, figures, form)
    here = {name: found[name] for name in wanted}
    mark = results.elsewhere(figures) if any(BATCH in name for name in wanted) else ""
    missing = {
        name: least - found[name] for name, least in wanted.items() if not found[name] >= least
    }
    return (
        f"{title}: {run.name}, {form}",
        _spelled(wanted),
        _spelled(here) + mark,
        results.trained_for(figures),
        _spelled(missing) or "nothing",
    )


def _of_student(results: Results, name: str) -> tuple[str, ...]:
    title, wanted = f"{name}, distilled against alone", "above 0 points, beyond the spread"
    alone, taught = (results.of(Run(name, distilled=d)) for d in (False, True))
    if not (alone and taught):
        return title, wanted, "not trained", "-", "all"
    gain = 100 * (mean(accuracies(taught)) - mean(accuracies(alone)))
    pairs = zip(accuracies(taught), accuracies(alone), strict=False)
    each = ", ".join(f"{100 * (one - other):+.2f}" for one, other in pairs)
    here = f"{gain:+.2f} points (by seed: {each})"
    if min(len(alone), len(taught)) < SEEDS:
        return title, wanted, here, results.trained_for(taught), "more seeds"
    spread = max(100 * statistics.stdev(accuracies(one)) for one in (alone, taught))
    missing = "nothing" if gain > spread else f"{spread - gain:.2f} points"
    return title, wanted, f"{here}, spread {spread:.2f}", results.trained_for(taught), missing


def _spelled(values: dict[str, float]) -> str:
    return ", ".join(
        "not timed" if math.isnan(value) else f"{value:.4g} {name}"
        for name, value in values.items()
    )
