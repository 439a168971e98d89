"""Exchanges the layers inside modules that cannot be traced."""

from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from slimnets.acceleration.attention import Stand
from slimnets.acceleration.choose import EAGER, FEW_SECONDS, choose, share_of_zeros
from slimnets.acceleration.compare import same_results
from slimnets.acceleration.measure import fastest, shortest_times
from slimnets.acceleration.nodes import Recorder, is_plain
from slimnets.acceleration.report import Row
from slimnets.acceleration.trace import trace
from slimnets.acceleration.widen import widen
from slimnets.layers import replace

LEAST_GAIN = 1.1


class Swapped(Stand):
    """A layer with a faster module that computes it."""

    def __init__(self, original: nn.Module, fast: nn.Module) -> None:
        super().__init__()
        self.fast = fast
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes of ``x``."""
        if isinstance(self.original, nn.Conv1d) and x.dim() != 3:
            return self.original(x)  # type: ignore[no-any-return]
        return self.fast(x)  # type: ignore[no-any-return]


def swap_layers(module: nn.Module, arguments: tuple[Any, ...], prefix: str = "") -> list[Row]:
    """Put faster modules in the place of the convolutions and linear layers of ``module``.

    Only where a layer is called with one tensor; ``module`` runs once on ``arguments``.
    """
    inputs: dict[nn.Module, Tensor] = {}

    def remember(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            inputs.setdefault(layer, args[0])

    layers = {n: m for n, m in module.named_modules() if n and is_plain(m)}
    hooks = [layer.register_forward_pre_hook(remember) for layer in layers.values()]
    try:
        module(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    rows = []
    for name, layer in layers.items():
        if layer not in inputs:
            continue
        fast, row = _faster(f"{prefix}{name}", layer, inputs[layer])
        rows.append(row)
        if fast is not None:
            replace(module, name, Swapped(layer, fast).eval())
    return rows


def _faster(name: str, layer: nn.Module, x: Tensor) -> tuple[nn.Module | None, Row]:
    """What is faster than ``layer``, if anything is, and the row of the report."""
    graph = trace(layer, 1)
    assert graph is not None
    Recorder(graph).run(x)
    widen(graph)
    choice, expected = choose(graph, (x,), {}), layer(x)
    calls = {EAGER: partial(layer, x)}
    for kind, variant in choice.variants.items():
        if same_results(variant, (x,), expected):
            calls[kind] = partial(variant, x)
    times = shortest_times(calls, FEW_SECONDS)
    best = fastest(times, LEAST_GAIN)
    how = next((row.choice for row in choice.rows.get(best, [])), EAGER)
    before, after = times[EAGER] * 1e3, times[best] * 1e3
    row = Row(name, type(layer).__name__, share_of_zeros(layer), how, before, after)
    return choice.variants.get(best), row


def opaque(graph: fx.GraphModule) -> dict[str, nn.Module]:
    """Modules with layers inside that the graph calls as a whole."""
    found = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            inner = [m for m in module.children() for m in m.modules()]
            if not type(module).__module__.startswith("torch.nn") and any(map(is_plain, inner)):
                found[str(node.target)] = module
    return found
