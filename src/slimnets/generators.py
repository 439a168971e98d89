"""The global random generators of Python, NumPy and PyTorch."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave them on the CPU where they are, also after an error, unlike Lightning's isolate_rng."""
    state = random_state(cuda=False)
    try:
        yield
    finally:
        set_random_state(state)


def random_state(cuda: bool = True) -> dict[str, Any]:
    """Their states, as tensors and plain values, which a checkpoint may hold.

    Args:
        cuda: Whether that of this process's CUDA device is among them, if there is one.
    """
    name, keys, *rest = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if cuda and torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to what :func:`random_state` returned, on as many devices as there are now."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
