"""When pruning begins and ends, in optimizer steps."""

import math
from dataclasses import dataclass
from typing import TypeAlias

Steps: TypeAlias = int | float
"""An int is a number of optimizer steps, a float in [0, 1] a fraction of the run."""


@dataclass(frozen=True)
class Span:
    """Masks are updated at the steps ``begin, begin + every, ...`` and at ``end``."""

    begin: int
    end: int
    every: int

    def progress(self, step: int) -> float | None:
        """How much of the span has passed at its last update, in [0, 1]; None before it begins."""
        if step < self.begin:
            return None
        if step >= self.end:
            return 1.0
        return (step - self.begin) // self.every * self.every / (self.end - self.begin)


def check_span(begin: Steps, end: Steps, every: Steps) -> None:
    """Raise where no run could make sense of these arguments.

    Raises:
        TypeError: If one is neither an int nor a float.
        ValueError: If one is out of range, or ``begin`` is after ``end``.
    """
    for argument, value in (("begin", begin), ("end", end), ("every", every)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(
                f"{argument}={value!r}: expected an int, in optimizer steps, or a float in [0, 1], "
                "a fraction of the run"
            )
        if isinstance(value, float) and not 0 <= value <= 1:
            hint = f", did you mean {int(value)} steps?" if value.is_integer() else ""
            raise ValueError(
                f"{argument}={value!r}: a float is a fraction of the run, in [0, 1]{hint}"
            )
        if value < 0:
            raise ValueError(f"{argument}={value!r}: expected no negative number of steps")
    if every == 0 and isinstance(every, int):
        raise ValueError("every=0: expected at least 1 optimizer step between two updates")
    if type(begin) is type(end) and begin > end:
        raise ValueError(f"begin={begin!r}, end={end!r}: pruning cannot end before it begins")


def resolve_span(begin: Steps, end: Steps, every: Steps, length: float) -> Span:
    """The span in steps of a run of ``length`` steps.

    Args:
        begin: First update.
        end: Last update, at which the target is reached.
        every: From one update to the next.
        length: Optimizer steps of the run; ``math.inf`` if unknown, which takes ints.

    Raises:
        ValueError: If the span does not fit into the run, or needs a length that is not known.

    Examples:
        >>> resolve_span(0.0, 0.75, 0.01, length=12)
        Span(begin=0, end=9, every=1)
    """
    fractions = {"begin": begin, "end": end, "every": every}
    if math.isinf(length):
        for argument, value in fractions.items():
            if isinstance(value, float):
                raise ValueError(
                    f"{argument}={value!r} is a fraction of the run, but the number of optimizer "
                    "steps of this run is not known (manual optimization, a time limit, or a "
                    "loader without length and no max_steps): give begin, end and every as ints, "
                    "in optimizer steps"
                )
    steps = {k: v if isinstance(v, int) else round(v * length) for k, v in fractions.items()}
    span = Span(steps["begin"], steps["end"], max(1, steps["every"]))
    if span.begin > span.end:
        raise ValueError(
            f"begin={begin!r} is step {span.begin} and end={end!r} is step {span.end} of the "
            f"{length:g} of this run: pruning cannot end before it begins"
        )
    if span.end > length:
        raise ValueError(
            f"end={end!r}: the run has only {length:g} optimizer steps, so the target sparsity "
            "would not be reached; train for longer, or let pruning end earlier (end=0.75 is at "
            "three quarters of any run)"
        )
    return span
