"""Chooses by measuring: how each layer of a graph is computed, and which variant is fastest."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimnets.acceleration.host import NO_ENGINE
from slimnets.acceleration.measure import shortest_times
from slimnets.acceleration.nodes import Recorder, module_of
from slimnets.acceleration.report import Row
from slimnets.acceleration.torch_layers import csr, exchange, following_relu, packed
from slimnets.acceleration.weights import is_full

if not NO_ENGINE:
    from slimnets.acceleration.partition import annotate, cut
    from slimnets.acceleration.region import Region

FEW_SECONDS = 0.2
CSR_FROM = 0.6
"""Share of zeros below which a CSR product is not worth trying."""

EAGER = "PyTorch"
KERNEL = "kernel"
"""The engine's, sparse or dense."""


@dataclass
class _Layer:
    """A convolution or linear layer, what it reads, and the seconds that each choice takes."""

    node: fx.Node
    layer: Any
    argument: Tensor
    times: dict[str, float] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def outside(self) -> str:
        """The fastest choice outside the engine."""
        return min((c for c in self.times if c != KERNEL), key=self.times.__getitem__)


@dataclass
class Choice:
    """The variants of a graph, and what they compute the layers with."""

    variants: dict[str, nn.Module]
    rows: dict[str, list[Row]]
    layers: dict[str, float] = field(default_factory=dict)  # name: seconds of the fastest choice


def choose(
    traced: fx.GraphModule, arguments: tuple[Any, ...], removed: Mapping[str, int]
) -> Choice:
    """Variants of ``traced``, each layer timed on what it reads when ``arguments`` are given.

    ``removed`` tells how many channels layers have lost, for the report.
    """
    layers = _layers(traced, arguments)
    for layer in layers.values():
        _time_outside(layer)
    variants: dict[str, nn.Module] = {}
    rows: dict[str, list[Row]] = {}

    def add(name: str, graph: fx.GraphModule | None, inside: set[str]) -> None:
        if graph is not None:
            variants[name] = graph
            rows[name] = [
                _row(one, KERNEL if n in inside else one.outside, removed)
                for n, one in layers.items()
            ]

    add("dense", _variant(traced, layers, set()), set())
    add("dense, channels last", _channels_last(_variant(traced, layers, set())), set())
    if layers and not NO_ENGINE:
        computable = annotate(traced)
        inside = set(layers) & computable
        whole = _variant(traced, layers, computable)
        _time_inside(whole, arguments, layers)
        add("engine", whole, inside)
        slow = {
            n
            for n in inside
            if layers[n].times.get(KERNEL, 0.0) > layers[n].times[layers[n].outside]
        }
        if slow and slow != inside:
            mixed = _variant(traced, layers, computable - slow)
            add("mixed", mixed, inside - slow)
    best = {str(one.node.target): min(one.times.values()) for one in layers.values()}
    return Choice(variants, rows, best)


def share_of_zeros(layer: Any) -> float:
    """Share of the weights of ``layer`` that are zero."""
    return 1.0 - int(layer.weight.count_nonzero()) / max(1, int(layer.weight.numel()))


def _layers(traced: fx.GraphModule, arguments: tuple[Any, ...]) -> dict[str, _Layer]:
    recorder = Recorder(traced)
    recorder.run(*arguments)
    found = {}
    for node, values in recorder.arguments.items():
        if len(values) == 1 and isinstance(values[0], Tensor) and not node.kwargs:
            found[node.name] = _Layer(node, module_of(node), values[0])
    return found


def _time_outside(one: _Layer) -> None:
    relu = following_relu(one.node) is not None
    made = {"dense, packed": packed(one.layer, one.argument, relu)}
    if share_of_zeros(one.layer) >= CSR_FROM:
        made["CSR"] = csr(one.layer, one.argument, relu)
    one.modules = {name: module for name, module in made.items() if module is not None}
    ways = {EAGER: one.layer, **one.modules}
    calls = {name: partial(module, one.argument) for name, module in ways.items()}
    one.times = shortest_times(calls, FEW_SECONDS)


def _variant(traced: fx.GraphModule, layers: dict[str, _Layer], inside: set[str]) -> fx.GraphModule:
    """A copy of ``traced`` with the nodes named ``inside`` in the engine."""
    graph = fx.GraphModule(traced, copy.deepcopy(traced.graph))
    for node in list(graph.graph.nodes):
        one = layers.get(node.name)
        if one is None or node.name in inside:
            continue
        if one.outside != EAGER:
            relu = following_relu(node)
            exchange(graph, node, one.modules[one.outside], relu)
    graph.recompile()
    if inside:
        cut(graph, inside)
    return graph


def _channels_last(graph: fx.GraphModule) -> fx.GraphModule | None:
    images = [
        n for n in graph.graph.nodes if n.op == "placeholder" and len(n.meta.get("shape", ())) == 4
    ]
    if not images:
        return None
    for node in images:
        with graph.graph.inserting_after(node):
            last: dict[str, Any] = {"memory_format": torch.channels_last}
            changed = graph.graph.call_method("contiguous", (node,), last)
        node.replace_all_uses_with(
            changed, delete_user_cb=lambda user, new=changed: user is not new
        )
    graph.recompile()
    return graph


def _time_inside(
    graph: fx.GraphModule, arguments: tuple[Any, ...], layers: dict[str, _Layer]
) -> None:
    seconds: dict[str, float] = {}

    class Profiler(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            module = self.fetch_attr(target)
            if isinstance(module, Region):
                seconds.update(module.profile(*args))
            return super().call_module(target, args, kwargs)

    Profiler(graph).run(*arguments)
    for one in layers.values():
        if str(one.node.target) in seconds:
            one.times[KERNEL] = seconds[str(one.node.target)]


def _row(one: _Layer, choice: str, removed: Mapping[str, int]) -> Row:
    before, after = one.times[EAGER], one.times.get(choice, one.times[EAGER])
    kind = one.node.meta.get("kind", type(one.layer).__name__)
    name = str(one.node.target)
    if choice == KERNEL:
        full = is_full(one.layer.weight.numpy(), getattr(one.layer, "groups", 1))
        choice = "dense kernel" if full else "sparse kernel"
    if name in removed:
        choice = f"{choice}, {removed[name]} channels removed"
    return Row(name, kind, share_of_zeros(one.layer), choice, before * 1e3, after * 1e3)
