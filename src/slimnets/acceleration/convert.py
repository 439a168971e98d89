"""From a network to an accelerated one: what runs, what is tried, and what is kept."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from slimnets.acceleration.attention import traceable
from slimnets.acceleration.choose import EAGER, Choice, choose
from slimnets.acceleration.compare import copied, same_draws, same_results
from slimnets.acceleration.host import NO_ENGINE
from slimnets.acceleration.measure import fastest, shortest_times
from slimnets.acceleration.module import Accelerated
from slimnets.acceleration.nodes import Recorder
from slimnets.acceleration.opaque import opaque, swap_layers
from slimnets.acceleration.pairs import pairs_or_products
from slimnets.acceleration.prepare import copy_for_inference, graph_of, positional, simplify
from slimnets.acceleration.report import Report
from slimnets.acceleration.shrink import shrink
from slimnets.acceleration.trace import versions_of
from slimnets.acceleration.widen import widen
from slimnets.inputs import tensors_in
from slimnets.layers import compressed_network, version_of
from slimnets.lowrank.modules import pairs_of

LEAST_GAIN = 1.05


def accelerate(model: nn.Module, example_input: Any) -> Accelerated:
    """A copy of ``model`` for inference on this processor, as fast as was found by measuring.

    Args:
        model: Any module. It is copied and left as it is.
        example_input: An input tensor, a tuple of the arguments of ``forward``, or a dictionary of
            them by name. What is fastest is measured on it, so give the batch size that you deploy
            with; other batch sizes and image sizes work.

    Returns:
        A module that computes the same in eval mode (up to rounding, see
        ``docs/acceleration.md``), with what was chosen in its ``report``.

    Raises:
        TypeError: If ``model`` is not a network, or ``forward`` cannot be called so.
        ValueError: If a lazy layer has no weights yet.
    """
    example = positional(model, example_input)
    original = copy_for_inference(compressed_network(model))
    with torch.no_grad(), same_draws():  # the caller's generators stay where they are
        original(*copied(example))  # what is made at the first run is there at the next
        versions = versions_of(original)
        given = _state_of(example)
        with same_draws():
            expected = original(*example)
        changed = "its input" if given != _state_of(example) else ""
        if versions != versions_of(original):
            changed = "its buffers"
        if changed:
            note = f"The network changes {changed} when it runs: it stays as it is."
            original = copy_for_inference(compressed_network(model))
            return Accelerated(original, None, example, Report(note=note))
        try:
            fast, report = _fastest(original, example, expected)
        except Exception as error:  # a network that runs must go on running
            fast, report = None, Report(note=f"The network stays as it is: {error!r:.200}")
    return Accelerated(original, fast, example, report)


def _state_of(arguments: tuple[Any, ...]) -> Any:
    """What differs after something in ``arguments`` has been changed."""
    return tree_flatten(arguments)[1], [version_of(tensor) for tensor in tensors_in(arguments)]


def _fastest(
    original: nn.Module, example: tuple[Any, ...], expected: Any
) -> tuple[nn.Module | None, Report]:
    report = Report(threads=torch.get_num_threads(), note=NO_ENGINE)
    network = traceable(original)
    graph = graph_of(network, example, expected)
    if graph is not None and pairs_of(network):
        network = pairs_or_products(network, lambda n: _times(n, example, expected))
        graph = graph_of(network, example, expected)
    if graph is None:
        rows = swap_layers(network, example)
        choice = Choice({"layers": network}, {"layers": rows})
        _say(report, "The network cannot be traced: only single layers have been exchanged.")
    else:
        choice = _of_graph(graph, example)
    variants = {n: v for n, v in choice.variants.items() if same_results(v, example, expected)}
    if isinstance(expected, Tensor) and expected.is_contiguous():
        variants = {name: _Contiguous(variant) for name, variant in variants.items()}
    if not variants:
        _say(report, "Nothing that was tried computes the same: the network stays as it is.")
        return None, report
    ways = {EAGER: original, **variants}
    times = shortest_times({name: partial(way, *example) for name, way in ways.items()})
    best = fastest(times, LEAST_GAIN)
    report.before, report.after = times[EAGER] * 1e3, times[best] * 1e3
    report.tried = {name: seconds * 1e3 for name, seconds in times.items()}
    report.rows = choice.rows.get(best, [])
    if best == EAGER:
        _say(report, "Nothing that was tried is faster: the network stays as it is.")
        return None, report
    return variants[best], report


def _say(report: Report, note: str) -> None:
    report.note = f"{note} {NO_ENGINE}".rstrip()


def _times(network: nn.Module, example: tuple[Any, ...], expected: Any) -> dict[str, float]:
    """Seconds of the fastest choice for each layer; nothing if the network cannot be traced."""
    graph = graph_of(network, example, expected)
    return {} if graph is None else _of_graph(graph, example).layers


def _of_graph(graph: fx.GraphModule, example: tuple[Any, ...]) -> Choice:
    arguments, removed = simplify(graph, example)
    rows = []
    for name, module in opaque(graph).items():
        if name in arguments:
            rows += swap_layers(module, arguments[name], f"{name}.")
    if widen(graph):
        Recorder(graph).run(*example)
        removed |= shrink(graph)  # of what was one-dimensional
    choice = choose(graph, example, removed)
    for found in choice.rows.values():
        found.extend(rows)
    return choice


class _Contiguous(nn.Module):
    """Results lie in memory as PyTorch's do, or ``view`` would fail on them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any) -> Tensor:
        return self.network(*args).contiguous()  # type: ignore[no-any-return]
