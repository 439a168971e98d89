"""From a module to a graph of layers."""

import copy
import gc
import inspect
import pickle
import random
import weakref
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.utils._pytree import tree_unflatten

from slimnets.acceleration.nodes import has_hooks, is_plain
from slimnets.acceleration.views import flatten_views, order_in_place
from slimnets.generators import generators_kept
from slimnets.layers import version_of


class _Proxy(fx.Proxy):
    def __hash__(self) -> int:  # by identity, it would be found in no set of sizes
        raise fx.proxy.TraceError("which of several values it is cannot be traced")


class _Tracer(fx.Tracer):
    """Traces what can be traced; a module with control flow becomes one node."""

    def __init__(self) -> None:
        super().__init__()
        self._proxies: dict[str, Any] = {}  # of parameters that are read by hand
        self.made: list[weakref.ref[fx.Proxy]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = _Proxy(node, self)
        self.made.append(weakref.ref(made))
        return made

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        self._proxies = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # which would become a plain one
            return self.create_proxy("call_function", OrderedDict, (dict(a),), {}).node
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) is nn.TransformerDecoderLayer:
            return False
        return has_hooks(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        known, depth = set(self.graph.nodes), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed(list(self.graph.nodes)):
                if node not in known:
                    self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            self.tensor_attrs.clear()
            self._proxies.clear()
            name = self.path_of_module(m)
            return self.create_proxy("call_module", name, args, kwargs)


def trace(model: nn.Module, arguments: int) -> fx.GraphModule | None:
    """``model`` as a graph of its first ``arguments`` arguments, the others at their defaults.

    Returns ``None`` where tracing fails, or where running the forward method has changed the
    module, kept a value or drawn random numbers: a graph would repeat what happened once. Nor can a
    graph call hooks of the model or a ``__call__`` of its own, or change a tensor in place for
    those who read it through another view.
    """
    if has_hooks(model) or not _is_called_as_a_module(model):
        return None
    model = nn.Sequential(model).eval() if is_plain(model) else model  # a layer has no graph
    defaults = _defaults_of(model)
    fixed = dict(list(defaults.items())[arguments:])
    if len(defaults) < arguments or any(one is inspect.Parameter.empty for one in fixed.values()):
        return None
    model = sharing_tensors(model)  # a failure may leave proxies in its attributes
    with generators_kept(), torch.no_grad():
        before = _state_of(model)
        try:
            graph, kept = _traced(model, fixed)
            _take_in_order(graph)
        except Exception:
            return None
        if kept or before != _state_of(model):
            return None
    if any(str(node.target).startswith("*") and node.users for node in _placeholders(graph)):
        return None  # of keyword arguments, the graph cannot know which are given
    for node in _placeholders(graph)[arguments:]:
        _erase(node)  # with its users: tracing asserts that a default is passed again
    for node in graph.nodes:
        node.type = None  # torch 2.6 cannot write `Tensor | None` twice
    traced = fx.GraphModule(model, graph)
    if not order_in_place(traced):
        return None
    flatten_views(traced)
    return traced


def _traced(model: nn.Module, fixed: dict[str, Any]) -> tuple[fx.Graph, bool]:
    """The graph, and whether something that outlives the run has kept a value of it: a state."""
    tracer = _Tracer()
    graph = tracer.trace(model, concrete_args=fixed or None)
    made = tracer.made
    del tracer
    if any(one() is not None for one in made):
        gc.collect()  # a failure within a module holds values in a circle
    return graph, any(one() is not None for one in made)


def _take_in_order(graph: fx.Graph) -> None:
    """Have ``graph`` take arguments and give results as they are.

    Where a default is a container, torch.fx makes a graph that takes all of them flattened.
    """
    flattened = getattr(graph._codegen, "pytree_info", None)
    if flattened is not None:
        (output,) = (node for node in graph.nodes if node.op == "output")
        output.args = (tree_unflatten(output.args[0], flattened.out_spec),)
        graph.set_codegen(CodeGen())


def _is_called_as_a_module(model: nn.Module) -> bool:
    """Whether ``__call__`` is PyTorch's own; that of a traced graph only explains its errors."""
    return isinstance(model, fx.GraphModule) or type(model).__call__ is nn.Module.__call__


def _erase(node: fx.Node) -> None:
    for user in list(node.users):
        _erase(user)
    node.graph.erase_node(node)


def _defaults_of(model: nn.Module) -> dict[str, Any]:
    """Argument of ``forward`` to its default; ``inspect.Parameter.empty`` where there is none."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy in eval mode of ``model`` whose parameters and buffers are those of ``model``."""
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return copied.eval()  # a copy of a graph of torch.fx is in training mode


def _state_of(model: nn.Module) -> Any:
    """What differs after ``model`` has been changed or random numbers have been drawn."""
    generators = (torch.get_rng_state().numpy(), random.getstate(), np.random.get_state())
    attributes = {}
    for name, module in model.named_modules():  # constants are the tracer's own
        own = {k: v for k, v in vars(module).items() if not k.startswith("_tensor_constant")}
        attributes[name] = {k: (id(v), _contents(v)) for k, v in own.items()}
    return pickle.dumps(generators), attributes, versions_of(model)


def _contents(value: Any) -> list[int]:
    """Which objects a container holds, in order."""
    if isinstance(value, dict):
        return [*map(id, value.keys()), *map(id, value.values())]
    return [*map(id, value)] if isinstance(value, list | tuple | set | deque) else []


def versions_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What differs after a parameter or buffer of ``model`` has been changed or exchanged."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {n: (id(t), version_of(t)) for n, t in tensors}
