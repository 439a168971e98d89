"""The accelerated network: the fast way where that is right, the network itself elsewhere."""

from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten

from slimnets.acceleration.report import Report
from slimnets.inputs import arguments_for

BY_VALUE = (
    *(int, float, str, bool, type(None), Enum, torch.dtype, type),
    *(FunctionType, BuiltinFunctionType, partial),
)
"""Arguments that a network may ask which one they are, unseen by the tracer."""


class Accelerated(nn.Module):
    """A network for inference, computed the fastest way that was found.

    Inputs of another type, rank or device than the example's, keyword arguments, autocast and
    anything else that was not foreseen go to ``original``, a copy of the network in eval mode.
    There is no gradient.

    Attributes:
        report: What was chosen for each layer, and what it gained.
    """

    fast: nn.Module | None
    known: nn.Module

    def __init__(
        self, original: nn.Module, fast: nn.Module | None, example: tuple[Any, ...], report: Report
    ) -> None:
        super().__init__()
        self.original = original
        # no children: they are not to be counted or saved, and nobody moves or converts them
        self.__dict__.update(fast=fast, known=original)
        self.report = report
        self.expected = [_kind(value) for value in example]
        self.placement = _placement(original)
        for module in original.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which refuses such hooks
                module.register_load_state_dict_post_hook(self._forget)
        self.eval()

    @property
    def compressed_network(self) -> nn.Module:
        """The network that is counted and saved."""
        return self.original

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network computes, in eval mode and without gradients."""
        with torch.no_grad():
            if kwargs and not args:
                with suppress(TypeError):  # which is the original's to raise
                    args, kwargs = arguments_for(self.original, kwargs)
            if self.fast is None or kwargs or not self._expects(args):
                return self.original(*args, **kwargs)
            try:
                return self.fast(*args)
            except Exception:  # PyTorch's own error, or what the graph did not foresee
                return self.original(*args)

    def _expects(self, args: tuple[Any, ...]) -> bool:
        if self.original is not self.known:  # a file of low-rank pairs has been loaded
            return False
        if torch.is_autocast_enabled("cpu") or len(args) != len(self.expected):
            return False
        if _get_current_dispatch_mode() is not None:  # operations are counted or changed
            return False
        return all(_kind(value) == kind for value, kind in zip(args, self.expected, strict=True))

    def train(self, mode: bool = True) -> "Accelerated":
        """Stays in eval mode, as it cannot be trained."""
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Accelerated":
        self.original._apply(fn, recurse)
        if _placement(self.original) != self.placement:  # moved, or of another type
            self._forget()
        return self

    def _forget(self, *_: Any) -> None:
        self.__dict__["fast"] = None  # it has copies of the weights, some packed


def _kind(value: Any) -> Any:
    """What has to stay the same for the graph to be right."""
    if type(value) in (Tensor, nn.Parameter):
        return value.dtype, value.device.type, value.dim(), value.layout
    if isinstance(value, BY_VALUE):
        return type(value), value
    leaves, structure = tree_flatten(value)
    if structure.is_leaf():  # nobody knows what is in it
        return object()
    return structure, [_kind(leaf) for leaf in leaves]


def _placement(module: nn.Module) -> list[tuple[torch.dtype, torch.device]]:
    tensors = [*module.parameters(), *module.buffers()]
    return [(t.dtype, t.device) for t in tensors]
