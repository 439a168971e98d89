"""How a LightningModule inside another goes on working: its hooks, its log, its settings.

Lightning knows the outer module only. It calls the outer module's hooks, asks which of them are
overridden and what arguments they take, and keeps on it what ``self.log`` needs.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import lightning as L
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.parsing import (
    lightning_getattr,
    lightning_hasattr,
    lightning_setattr,
)
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type[L.LightningModule])

HOOKS = (
    *(
        name
        for kind in (ModelHooks, DataHooks, CheckpointHooks)
        for name in vars(kind)
        if not name.startswith("_")
    ),
    "configure_callbacks",
    "configure_optimizers",
    "configure_gradient_clipping",
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
    "backward",
    "optimizer_step",
    "optimizer_zero_grad",
    "lr_scheduler_step",
)
SETTINGS = ("automatic_optimization", "strict_loading", "example_input_array")
LOOKED_FOR = ("lr", "learning_rate", "batch_size", "backbone", "flops_per_batch")
"""What Lightning's finders, finetuning and throughput monitor look for in a module, by name."""
BOOKKEEPING = ("_current_fx_name", "_metric_attributes")


def inner(module: L.LightningModule) -> L.LightningModule | None:
    """The student of ``module`` where it is a LightningModule."""
    student = module.__dict__.get("_modules", {}).get("student")
    return student if isinstance(student, L.LightningModule) else None


def student_hook(around: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Decorator: where the student is a LightningModule with this hook, it is the student's.

    Args:
        around: Called in place of the student's hook, as ``around(module, name, hook, *args)``.
    """

    def decorate(own: F) -> F:
        return cast(F, _StudentHook(own, around))

    return decorate


def delegates_to_student(cls: C) -> C:
    """Class decorator: hooks and settings that ``cls`` does not define are the student's."""
    for name in HOOKS:
        if name not in vars(cls):
            hook = _StudentHook(getattr(L.LightningModule, name), None)
            hook.__set_name__(cls, name)
            setattr(cls, name, hook)
    for name in SETTINGS:
        setattr(cls, name, _setting(name))
    for name in LOOKED_FOR:
        setattr(cls, name, _looked_for(name))
    for name in BOOKKEEPING:
        setattr(cls, name, _mirrored(name))
    return cls


class _StudentHook:
    """The student's bound method itself, so that what Lightning reads from it is the student's.

    It has no ``__set__``: an instance may have a hook of its own, as ``torch.compile`` and
    LightningCLI give it one.
    """

    def __init__(self, own: Callable[..., Any], around: Callable[..., Any] | None) -> None:
        self._own = own
        self._around = around

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: L.LightningModule | None, owner: type | None = None) -> Any:
        if module is None:
            return self._own
        student = inner(module)
        if student is None:
            return self._own.__get__(module, owner)
        if not is_overridden(self._name, student):
            return getattr(L.LightningModule, self._name).__get__(module, owner)
        hook = getattr(student, self._name)
        if self._around is None:
            return hook
        wrapped = functools.partial(self._around, module, self._name, hook)
        # Lightning unwraps one level, which a decorated hook of the student's may need itself
        wrapped.__wrapped__ = getattr(hook, "__wrapped__", hook)  # type: ignore[attr-defined]
        return wrapped


def _setting(name: str) -> property:
    default = cast(property, getattr(L.LightningModule, name))

    def get(module: L.LightningModule) -> Any:
        student = inner(module)
        return default.__get__(module) if student is None else getattr(student, name)

    def set_(module: L.LightningModule, value: Any) -> None:
        student = inner(module)
        if student is None:
            default.__set__(module, value)
        else:
            setattr(student, name, value)

    return property(get, set_)


def _looked_for(name: str) -> property:
    """The student's attribute or hyper-parameter where it has one, else an ordinary attribute."""

    def holder(module: L.LightningModule) -> L.LightningModule | None:
        student = inner(module)
        return student if student is not None and lightning_hasattr(student, name) else None

    def get(module: L.LightningModule) -> Any:
        student = holder(module)
        if student is not None:
            return lightning_getattr(student, name)
        if name in vars(module):
            return vars(module)[name]
        raise AttributeError(name)  # whereupon nn.Module looks among its submodules

    def set_(module: L.LightningModule, value: Any) -> None:
        student = holder(module)
        if student is None:
            vars(module)[name] = value
        else:
            lightning_setattr(student, name, value)

    return property(get, set_)


def _mirrored(name: str) -> property:
    """What Lightning writes on the outer module, and ``log`` of the inner one reads there."""

    def get(module: L.LightningModule) -> Any:
        return module.__dict__.get(name)

    def set_(module: L.LightningModule, value: Any) -> None:
        module.__dict__[name] = value
        student = inner(module)
        if student is not None:
            setattr(student, name, value)

    return property(get, set_)


@contextmanager
def students_keys(checkpoint: dict[str, Any]) -> Iterator[None]:
    """Show the weights in ``checkpoint`` under the names that the student alone gives them."""
    prefix = "student."
    state = checkpoint["state_dict"]
    others = {key: state.pop(key) for key in list(state) if not key.startswith(prefix)}
    _rename(state, lambda key: key.removeprefix(prefix))
    try:
        yield
    finally:
        state = checkpoint["state_dict"]
        _rename(state, lambda key: prefix + key)
        state.update(others)


def _rename(state: dict[str, Any], new_name: Callable[[str], str]) -> None:
    # in place, for torch keeps the versions of the layers in an attribute of the dict
    items = [(new_name(key), value) for key, value in state.items()]
    state.clear()
    state.update(items)


@contextmanager
def weighed_backward(
    student: nn.Module,
    weigh: Callable[[Tensor], Tensor],
    paused: Callable[[], AbstractContextManager[None]],
) -> Iterator[None]:
    """Let ``student.manual_backward`` take what ``weigh`` makes of its loss, while ``paused``."""
    plain, own = cast(L.LightningModule, student).manual_backward, vars(student)

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        total = weigh(loss)
        with paused():
            plain(total, *args, **kwargs)

    before = own.get("manual_backward")  # an instance may have one of its own
    own["manual_backward"] = manual_backward
    try:
        yield
    finally:
        del own["manual_backward"]
        if before is not None:
            own["manual_backward"] = before
