"""What a node of a traced graph calls."""

from typing import Any

from torch import Tensor, fx, nn

from slimnets.layers import computes_as


def has_hooks(module: nn.Module) -> bool:
    """Whether something happens when ``module`` is called, besides its forward method."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_unaltered(module: nn.Module) -> bool:
    """Whether ``module`` does what its type says: no hooks, and no forward method of its own."""
    return not has_hooks(module) and "forward" not in vars(module)


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that ``node`` calls."""
    if node.op != "call_module":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    return owner.get_submodule(str(node.target))


def layer_of(node: fx.Node) -> str:
    """The name of the module that ``node`` calls, or reads a parameter of; "" if it does not."""
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    return str(node.target) if node.op == "call_module" else ""


def is_plain(layer: nn.Module | None) -> bool:
    """Whether ``layer`` is a convolution or linear layer that computes nothing else."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    if not isinstance(layer, kinds) or has_hooks(layer) or "weight" not in layer._parameters:
        return False
    return any(computes_as(layer, kind) for kind in kinds)


class Recorder(fx.Interpreter):
    """Runs a graph, writes each node's shape, and keeps the inputs of some nodes."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.arguments: dict[fx.Node, tuple[Any, ...]] = {}
        self.opaque: dict[str, tuple[Any, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node of the graph."""
        if n.op == "call_module" and is_plain(module_of(n)):
            self.arguments[n] = self.fetch_args_kwargs_from_env(n)[0]
        elif n.op == "call_module" and not n.kwargs:
            self.opaque[str(n.target)] = self.fetch_args_kwargs_from_env(n)[0]
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
            n.meta["dtype"] = result.dtype
        return result
