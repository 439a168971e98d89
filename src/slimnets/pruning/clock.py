"""The steps of the optimizers, and how sparse their weights are to be by them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from slimnets.pruning.span import Span

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Decorator: torch.compile passes over what runs within an optimizer's step that it compiles.

    Hooks of the step stand in it, and so does the closure with all hooks of Lightning's.
    """
    return cast(F, torch.compiler.disable(function))


class Clock:
    """Counts the steps of each optimizer; of weights that several have, those of all of them.

    Args:
        span: When masks are updated.
        steps: Those of each optimizer so far.
        initial: The share of zeros at the beginning of the span.
        schedule: From progress to a share of the way from there to the target.
    """

    def __init__(
        self,
        span: Span,
        steps: Sequence[int],
        initial: float,
        schedule: Callable[[float], float],
    ) -> None:
        self.span = span
        self.steps = list(steps)
        self.initial = initial
        self.schedule = schedule
        self._depths: list[int] = []  # of each optimizer, how many calls of step are running
        self._hooks: list[RemovableHandle] = []
        self._optimizers: list[Optimizer] = []
        self._owners: list[tuple[int, ...]] = []  # each optimizer, and those with weights in common

    @property
    def progress(self) -> list[float | None]:
        """How much of the span has passed, of each of ``_owners``; None before it begins."""
        return [self._progress_of(owners) for owners in self._owners]

    @property
    def latest(self) -> int:
        """The most steps that any weights have seen."""
        return max(map(self._steps_of, self._owners), default=0)

    @property
    def is_running(self) -> bool:
        """Whether it counts."""
        return bool(self._hooks)

    def start(self, optimizers: Sequence[Optimizer], after_step: Callable[[int], None]) -> None:
        """Count, and call ``after_step`` with the index of the optimizer after every step.

        Raises:
            TypeError: If the steps of one cannot be followed.
        """
        for optimizer in optimizers:
            if not hasattr(optimizer, "register_step_post_hook"):  # a proxy may have it
                raise TypeError(
                    "GradualPrune follows the steps of a torch.optim.Optimizer, and "
                    f"{type(optimizer).__name__} is none: derive it from that, or return the "
                    "optimizer within it from configure_optimizers"
                )
        self._optimizers = list(optimizers)
        self.steps += [0] * (len(optimizers) - len(self.steps))
        self.settle()
        alone = {(index,) for index in range(len(optimizers))}
        self._owners = sorted(alone | {*_owners_in(optimizers).values()})
        for index, optimizer in enumerate(optimizers):
            before, after = partial(self._enter, index), partial(self._leave, index, after_step)
            self._hooks.append(optimizer.register_step_pre_hook(before))
            self._hooks.append(optimizer.register_step_post_hook(after))

    def follow(self, optimizers: Sequence[Optimizer], after_step: Callable[[int], None]) -> None:
        """Go on with ``optimizers``, if others have taken the place of those before."""
        if self.is_running and list(map(id, optimizers)) != list(map(id, self._optimizers)):
            self.stop()
            self.start(optimizers, after_step)

    def settle(self) -> None:
        """Forget steps that have raised; none is running now."""
        self._depths = [0] * len(self.steps)

    def stop(self) -> None:
        """Leave no hook behind."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizers = [], []

    def due(
        self,
        parameters: Mapping[str, nn.Parameter],
        targets: Mapping[str, float],
        index: int | None = None,
    ) -> dict[str, float]:
        """The share of zeros that each weight should have by now, of one optimizer or of all."""
        owners_in = _owners_in(self._optimizers)
        due = {}
        for name, parameter in parameters.items():
            owners = owners_in.get(parameter, ())
            if index is not None and index not in owners:
                continue
            progress = self._progress_of(owners or (0,))  # frozen weights follow the first
            if progress is None:
                due[name] = 0.0
                continue
            share = float(self.schedule(progress))  # a tensor of one value will do
            # rounding must not keep the end from being the target
            between = self.initial + (targets[name] - self.initial) * share
            due[name] = targets[name] if share == 1 else between
        return due

    def _progress_of(self, owners: tuple[int, ...]) -> float | None:
        return self.span.progress(self._steps_of(owners))

    def _steps_of(self, owners: tuple[int, ...]) -> int:
        return sum(self.steps[index] for index in owners)

    @untraced
    def _enter(self, index: int, *_: Any) -> None:
        self._depths[index] += 1

    @untraced
    def _leave(self, index: int, after_step: Callable[[int], None], *_: Any) -> None:
        # torch calls these hooks again for a super().step() within a step
        self._depths[index] -= 1
        self.steps[index] += self._depths[index] == 0
        after_step(index)


def _owners_in(optimizers: Sequence[Optimizer]) -> dict[nn.Parameter, tuple[int, ...]]:
    """Each parameter, and the indices of the optimizers that have it."""
    found: dict[nn.Parameter, tuple[int, ...]] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter in {one for group in optimizer.param_groups for one in group["params"]}:
            found[parameter] = (*found.get(parameter, ()), index)
    return found
