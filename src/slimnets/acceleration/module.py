"""The accelerated network, and the way there."""

import copy
import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import is_dataclass
from enum import Enum
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimnets.acceleration.attention import traceable
from slimnets.acceleration.choose import ENGINE, Choice, choose
from slimnets.acceleration.fold import fold_batch_norm
from slimnets.acceleration.inside import opaque, swap_layers
from slimnets.acceleration.measure import fastest
from slimnets.acceleration.pairs import has_pairs, pairs_or_products
from slimnets.acceleration.report import Report
from slimnets.acceleration.shrink import shrink
from slimnets.acceleration.trace import Recorder, trace, version_of, versions_of
from slimnets.layers import compressed_network

LEAST_GAIN = 1.05
BY_VALUE = (int, float, str, bool, type(None), Enum, torch.dtype, type, FunctionType)
"""Arguments that a network may ask which one they are, unseen by the tracer."""

TOLERANCE = 1e-4
"""Largest difference from PyTorch's result that is taken for rounding, as a share of its largest
value."""


class Accelerated(nn.Module):
    """A network for inference, computed the fastest way that was found.

    Inputs of another type, rank or device than the example's, keyword arguments, autocast and
    anything else that was not foreseen go to ``original``, a copy of the network in eval mode.
    There is no gradient.

    Attributes:
        report: What was chosen for each layer, and what it gained.
    """

    def __init__(
        self, original: nn.Module, fast: nn.Module | None, example: tuple[Any, ...], report: Report
    ) -> None:
        super().__init__()
        self.original = original
        self.fast = fast
        self.report = report
        self.expected = [_kind(value) for value in example]
        self.state = _placement(original)
        original.register_load_state_dict_post_hook(self._forget)
        self.eval()

    @property
    def compressed_network(self) -> nn.Module:
        """The network that is counted and saved."""
        return self.original

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network computes, in eval mode and without gradients."""
        with torch.no_grad():
            if self.fast is None or kwargs or not self._expects(args):
                return self.original(*args, **kwargs)
            try:
                return self.fast(*args)
            except Exception:  # PyTorch's own error, or what the graph did not foresee
                return self.original(*args)

    def _expects(self, args: tuple[Any, ...]) -> bool:
        if torch.is_autocast_enabled("cpu") or len(args) != len(self.expected):
            return False
        return all(_kind(value) == kind for value, kind in zip(args, self.expected, strict=True))

    def train(self, mode: bool = True) -> "Accelerated":
        """Stays in eval mode, as it cannot be trained."""
        return super().train(False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Accelerated":
        self.original._apply(fn, recurse)
        if _placement(self.original) != self.state:  # moved, or of another type
            self.fast = None
        return self

    def _forget(self, *_: Any) -> None:
        self.fast = None  # it has copies of the weights, some packed


def _kind(value: Any) -> Any:
    """What has to stay the same for the graph to be right."""
    if type(value) in (Tensor, nn.Parameter):
        return value.dtype, value.device.type, value.dim(), value.layout
    if type(value) in (tuple, list):
        return type(value), [_kind(one) for one in value]
    if type(value) is dict:
        return dict, [(key, _kind(one)) for key, one in value.items()]
    return type(value), value if isinstance(value, BY_VALUE) else None


def _placement(module: nn.Module) -> list[tuple[torch.dtype, torch.device]]:
    tensors = [*module.parameters(), *module.buffers()]
    return [(t.dtype, t.device) for t in tensors]


def accelerate(model: nn.Module, example_input: Any) -> Accelerated:
    """A copy of ``model`` for inference on this processor, as fast as was found by measuring.

    Args:
        model: Any module. It is copied and left as it is.
        example_input: An input tensor, or a tuple of the arguments of ``forward``. What is
            fastest is measured on it, so give the batch size that you deploy with; other batch
            sizes and image sizes work.

    Returns:
        A module that computes the same in eval mode (up to rounding, see ``docs``), with what was
        chosen in its ``report``.

    Raises:
        TypeError: If ``model`` is not a network, or ``example_input`` is a dictionary.
    """
    example = positional(model, example_input)
    original = copy_for_inference(compressed_network(model))
    with torch.no_grad():
        original(*example)  # what is made at the first run is there at the next
        versions = versions_of(original)
        given = _versions(example)
        expected = original(*example)
        changed = "its input" if given != _versions(example) else ""
        if versions != versions_of(original):
            changed = "its buffers"
        if changed:
            note = f"The network changes {changed} when it runs: it stays as it is."
            original = copy_for_inference(compressed_network(model))
            return Accelerated(original, None, example, Report(note=note))
        try:
            fast, report = _fastest(original, example, expected)
        except Exception as error:  # a network that runs must go on running
            fast, report = None, Report(note=f"The network stays as it is: {error!r}")
    return Accelerated(original, fast, example, report)


def positional(model: nn.Module, example_input: Any) -> tuple[Any, ...]:
    """The arguments of ``forward`` that ``example_input`` is; copies, for it may work in place.

    Raises:
        TypeError: If ``model`` is not a network, or ``example_input`` is a dictionary.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected an nn.Module")
    if isinstance(example_input, Mapping):
        raise TypeError(
            "example_input: got a dictionary, expected a tensor or a tuple of the arguments of "
            "forward; a dictionary that is one of them stands in a tuple, (dictionary,)"
        )
    return _copied(example_input if isinstance(example_input, tuple) else (example_input,))  # type: ignore[no-any-return]


def _copied(value: Any) -> Any:
    """``value`` with copies of the tensors in it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    return {key: _copied(one) for key, one in value.items()} if type(value) is dict else value


def _versions(value: Any) -> Any:
    """What differs after a tensor in ``value`` has been changed."""
    if isinstance(value, Tensor):
        return version_of(value)
    if type(value) in (tuple, list, dict):
        return [*map(_versions, value.values() if type(value) is dict else value)]
    return None


def copy_for_inference(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters need no gradient."""
    trainer = getattr(model, "_trainer", None)
    # not the Trainer of a LightningModule
    memo: dict[int, Any] = {} if trainer is None else {id(trainer): None}
    for module in model.modules():  # weights that hooks compute cannot be copied with their history
        memo.update({id(t): t.detach().clone() for t in vars(module).values() if _has_history(t)})
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def _has_history(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_leaf


def _fastest(
    original: nn.Module, example: tuple[Any, ...], expected: Any
) -> tuple[nn.Module | None, Report]:
    report = Report(threads=torch.get_num_threads())
    network = traceable(original)
    graph = _graph(network, example, expected)
    if graph is not None and has_pairs(network):
        network = pairs_or_products(network, lambda n: _times(n, example, expected))
        graph = _graph(network, example, expected)
    if graph is None:
        rows = swap_layers(network, example)
        choice = Choice({"layers": network}, {"layers": rows})
        report.note = "The network cannot be traced: only single layers have been exchanged."
    else:
        choice = _of_graph(graph, example)
    variants = {n: v for n, v in choice.variants.items() if same_results(v, example, expected)}
    if not variants:
        report.note = "Nothing that was tried computes the same: the network stays as it is."
        return None, report
    calls: dict[str, Any] = {"PyTorch": lambda: original(*example)}
    calls.update({n: lambda v=v: v(*example) for n, v in variants.items()})
    times = fastest(calls)
    best = min(times, key=times.__getitem__)
    if times[best] * LEAST_GAIN > times["PyTorch"]:
        best = "PyTorch"
    report.before, report.after = times["PyTorch"] * 1e3, times[best] * 1e3
    report.tried = {name: seconds * 1e3 for name, seconds in times.items()}
    report.rows = choice.rows.get(best, [])
    if best == "PyTorch":
        report.note = "Nothing that was tried is faster: the network stays as it is."
        return None, report
    if not ENGINE:
        report.note = "Numba is missing, and with it the sparse kernel: pip install slimnets[fast]"
    return variants[best], report  # type: ignore[return-value]


def _graph(network: nn.Module, example: tuple[Any, ...], expected: Any) -> fx.GraphModule | None:
    graph = trace(network, len(example))
    return graph if graph is not None and same_results(graph, example, expected) else None


def _times(network: nn.Module, example: tuple[Any, ...], expected: Any) -> dict[str, float]:
    """Seconds of the fastest choice for each layer; nothing if the network cannot be traced."""
    graph = _graph(network, example, expected)
    return {} if graph is None else _of_graph(graph, example).layers


def _of_graph(graph: fx.GraphModule, example: tuple[Any, ...]) -> Choice:
    recorder = Recorder(graph)
    recorder.run(*example)
    fold_batch_norm(graph)
    Recorder(graph).run(*example)
    removed = shrink(graph)
    rows = []
    for name, module in opaque(graph).items():
        if name in recorder.opaque:
            rows += swap_layers(module, recorder.opaque[name], f"{name}.")
    Recorder(graph).run(*example)
    choice = choose(graph, example, removed)
    all_rows = {n: [*r, *rows] for n, r in choice.rows.items()}
    return Choice(choice.variants, all_rows, choice.layers)


def same_results(variant: Callable[..., Any], example: tuple[Any, ...], expected: Any) -> bool:
    """Whether ``variant`` computes what was ``expected`` of ``example``, up to rounding."""
    try:
        with redirect_stderr(io.StringIO()):  # torch.fx prints what went wrong before it raises
            return _close(variant(*example), expected)
    except Exception:
        return False


def _close(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        if not expected.is_floating_point():
            return torch.equal(found, expected)
        finite = expected[expected.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
    if type(found) is not type(expected):  # as a graph makes a dict of its subclasses
        return False
    if isinstance(expected, dict):
        same = found.keys() == expected.keys()
        return same and all(_close(found[k], v) for k, v in expected.items())
    if isinstance(expected, tuple | list):
        same = len(found) == len(expected)
        return same and all(_close(f, e) for f, e in zip(found, expected, strict=True))
    if is_dataclass(expected):
        return _close(vars(found), vars(expected))
    return bool(found == expected)
