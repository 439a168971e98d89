"""Schedules: how far pruning has come, as a function of how much of its span has passed.

A schedule is any callable from progress in [0, 1] to a share in [0, 1] of the way from the initial
to the final sparsity, with ``schedule(1.0) == 1.0``.
"""

from collections.abc import Callable


def cubic(progress: float) -> float:
    """Fast at first, while there is much to choose from, and slow towards the end.

    Zhu & Gupta, "To prune, or not to prune" (arXiv 1710.01878), equation 1.

    Examples:
        >>> [cubic(p) for p in (0.0, 0.5, 1.0)]
        [0.0, 0.875, 1.0]
    """
    return float(1 - (1 - progress) ** 3)


def linear(progress: float) -> float:
    """The same amount at every update.

    Examples:
        >>> linear(0.25)
        0.25
    """
    return float(progress)


def one_shot(progress: float) -> float:
    """Everything at the first update, at ``begin``.

    Examples:
        >>> one_shot(0.0)
        1.0
    """
    return 1.0


def check_schedule(schedule: Callable[[float], float]) -> None:
    """Raise unless ``schedule`` is one, and ends at the target.

    Raises:
        TypeError: If it is not callable with progress, or returns no number.
        ValueError: If it leaves [0, 1], or does not end at 1.
    """
    if not callable(schedule):
        raise TypeError(f"schedule={schedule!r}: expected a callable of progress in [0, 1]")
    for progress in (i / 100 for i in range(101)):
        try:
            share = float(schedule(progress))
        except (TypeError, ValueError, RuntimeError) as error:
            raise (TypeError if isinstance(error, TypeError) else ValueError)(
                f"schedule={schedule!r}: expected a callable from progress in [0, 1] to one number "
                f"in [0, 1], such as lambda progress: progress**2; for {progress}: {error}"
            ) from error
        if not 0 <= share <= 1 or (progress == 1.0 and share != 1):
            expected = "1.0" if progress == 1.0 else "a share in [0, 1]"
            raise ValueError(
                f"schedule={schedule!r}: expected schedule({progress}) to be {expected}, "
                f"got {share!r}"
            )
