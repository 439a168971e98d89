"""Cuts the nodes that the engine is to compute out of a graph, as regions."""

from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import create_op_support

from slimnets.acceleration.lower import form_of, lowered
from slimnets.acceleration.nodes import is_plain, module_of
from slimnets.acceleration.region import Port, Region
from slimnets.acceleration.steps import INFINITY, Add, Clamp, Concat, Conv, Linear, Pad, Step


def annotate(traced: fx.GraphModule) -> set[str]:
    """Mark what the engine can compute, and name it; the nodes' shapes have to be there."""
    found = set()
    for node in traced.graph.nodes:
        result = lowered(node)
        if result is None:
            continue
        found.add(node.name)
        sources, _, node.meta["form"] = result
        node.meta["vector"] = (
            isinstance(module_of(node), nn.Linear)
            or node.target in ("mean", torch.mean)
            or (node.meta["form"] == "features" and all(s.meta.get("vector") for s in sources))
        )
    return found


def cut(traced: fx.GraphModule, names: set[str]) -> dict[str, Region]:
    """Replace the nodes of these names by regions, which are returned by theirs."""
    chosen = create_op_support(lambda _, node: node.name in names)
    partitioner = CapabilityBasedPartitioner(traced, chosen, allows_single_node_partition=True)
    partitions = partitioner.propose_partitions()
    for one in partitions:
        for node in [n for n in one.nodes if n.name not in names]:
            one.remove_node(node)  # a slice, which the partitioner takes for a part of a tuple
    partitions = [one for one in partitions if any(is_plain(module_of(n)) for n in one.nodes)]
    if not partitions:
        return {}
    partitioner.fuse_partitions(partitions, prefix="region_")
    regions = {}
    for name, part in list(traced.named_children()):
        if name.startswith("region_") and isinstance(part, fx.GraphModule):
            regions[name] = region(part)
            setattr(traced, name, regions[name])
    return regions


def region(part: fx.GraphModule) -> Region:
    """``part`` as a region of the engine."""
    values: dict[fx.Node, int] = {}
    steps: list[Step] = []
    inputs: dict[fx.Node, Port] = {}
    arguments = [n for n in part.graph.nodes if n.op == "placeholder"]
    for node in part.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        result = lowered(node)
        assert result is not None, node
        sources, make, form = result
        for source in sources:
            if source not in values:
                values[source] = len(values)
                flat = isinstance(module_of(node), nn.Linear) or form_of(source) != "image"
                flat = flat if form_of(source) else form == "features"
                inputs[source] = Port(values[source], flat, arguments.index(source))
        values[node] = len(values)
        step = make([values[s] for s in sources], values[node])
        step.name = str(node.target) if node.op == "call_module" else node.name
        steps.append(step)
        node.meta["form"] = form
    last: Any = part.graph.output_node().args[0]
    returned = list(last) if isinstance(last, tuple | list) else [last]
    outputs = [Port(values[n], n.meta["form"] == "features") for n in returned]
    steps, renamed = fuse(steps, {port.value for port in outputs})
    outputs = [Port(renamed.get(port.value, port.value), port.features) for port in outputs]
    return Region(steps, list(inputs.values()), outputs, part)


def fuse(steps: list[Step], outputs: set[int]) -> tuple[list[Step], dict[int, int]]:
    """Put clamps and sums into the steps before them; also returns which values are others."""
    uses = Counter(source for step in steps for source in step.sources)
    uses.update(outputs)
    renamed: dict[int, int] = {}
    fused: list[Step] = []
    made: dict[int, Any] = {}
    for step in steps:
        step.sources = [renamed.get(s, s) for s in step.sources]
        source, maker = step.sources[0], made.get(step.sources[0])
        if _does_nothing(step) or (uses[source] == 1 and _takes_over(maker, step)):
            renamed[step.target] = source
            uses[source] += uses[step.target] - 1
            continue
        if isinstance(step, Conv):
            _from_unpadded(step, maker, uses, fused)
        if isinstance(step, Add):
            step = _into_product(step, made, uses, fused)
        fused.append(step)
        made[step.target] = step
    return fused, renamed


def _does_nothing(step: Step) -> bool:
    return isinstance(step, Clamp) and step.low == -INFINITY and step.high == INFINITY


def _takes_over(maker: Step | None, step: Step) -> bool:
    """Whether ``maker`` can do what ``step`` does to its result, and now does so."""
    if isinstance(step, Clamp) and maker and _is_unlimited(maker):
        maker.low, maker.high = step.low, step.high
        return True
    if isinstance(step, Pad) and isinstance(maker, Conv) and max(step.padding) <= 0:
        if maker.stride != (1, 1) or len(maker.sources) > 1:
            return False
        maker.padding = _sum(maker.padding, step.padding)  # it leaves out what would be cut off
        return True
    return False


def _from_unpadded(step: Conv, maker: Step | None, uses: Counter[int], fused: list[Step]) -> None:
    """Have ``step`` pad its input itself, instead of the step before."""
    if isinstance(maker, Pad) and _is_unlimited(maker) and min(*maker.padding, *step.padding) >= 0:
        step.padding = _sum(step.padding, maker.padding)
        step.sources = [*maker.sources, *step.sources[1:]]
        uses[maker.target] -= 1
        uses[maker.sources[0]] += 1
        if not uses[maker.target]:
            fused.remove(maker)
            uses[maker.sources[0]] -= 1


def _sum(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, int, int, int]:
    top, bottom, left, right = (a + b for a, b in zip(one, other, strict=True))
    return top, bottom, left, right


def _is_unlimited(step: Step) -> bool:
    return not isinstance(step, Clamp | Concat) and step.low == -INFINITY and step.high == INFINITY


def _into_product(step: Add, made: dict[int, Any], uses: Counter[int], fused: list[Step]) -> Step:
    """The convolution or linear layer that can start from the other summand, or ``step``."""
    for mine, other in (step.sources, step.sources[::-1]):
        maker = made.get(mine)
        if not isinstance(maker, Conv | Linear) or len(maker.sources) > 1 or mine == other:
            continue
        if _is_unlimited(maker) and uses[mine] == 1:
            fused.remove(maker)
            maker.sources, maker.target = [maker.sources[0], other], step.target
            return maker
    return step
