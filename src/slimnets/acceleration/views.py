"""Nodes of a graph that share memory, or ask only for the size of the batch."""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from slimnets.acceleration.nodes import module_of

IN_PLACE_FUNCTIONS = {operator.iadd, operator.imul, operator.isub, operator.itruediv}


def _name(node: fx.Node) -> str:
    """That of the method or function that ``node`` calls."""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _works_in_place(node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module_of(node), "inplace", False))
    if _name(node).endswith("_") and not _name(node).endswith("__"):
        return True
    return node.target in IN_PLACE_FUNCTIONS or bool(node.kwargs.get("inplace"))


# fmt: off
VIEWS = {
    "getitem", "getattr", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten",
    "ravel", "transpose", "t", "permute", "squeeze", "unsqueeze", "chunk", "split", "tensor_split",
    "narrow", "select", "expand", "expand_as", "detach", "movedim", "moveaxis", "unbind",
    "swapaxes", "swapdims", "contiguous", "diagonal", "unfold", "to", "float", "type", "type_as",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
}
# fmt: on
"""Functions and methods whose result may share its memory with their first argument."""

ATTRIBUTES = ("T", "mT", "H", "mH", "data", "real", "imag")
VIEWING = (nn.Flatten, nn.Unflatten, nn.Identity, _DropoutNd)


def _viewed(node: fx.Node) -> fx.Node | None:
    """What ``node`` may be a view of."""
    source = node.args[0] if node.args else None
    name = _name(node)
    if not isinstance(source, fx.Node) or (name == "getattr" and node.args[1] not in ATTRIBUTES):
        return None
    return source if name in VIEWS or isinstance(module_of(node), VIEWING) else None


def order_in_place(traced: fx.GraphModule) -> bool:
    """Let later readers of a tensor that was changed in place read the result instead.

    The engine computes results elsewhere, so nobody may rely on the change.

    Returns:
        Whether that is all: False if a change is read through another view.
    """
    place = {node: i for i, node in enumerate(traced.graph.nodes)}
    roots: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        viewed = _viewed(node)
        roots[node] = node if viewed is None else roots[viewed]
        if "out" in node.kwargs:
            return False
        changed = node.args[0] if node.args else node.kwargs.get("input")
        if _works_in_place(node) and isinstance(changed, fx.Node):
            own = (changed, node)
            others = [n for n, root in roots.items() if root is roots[changed] and n not in own]
            if any(place[user] > place[node] for other in others for user in other.users):
                return False
            later = {user for user in changed.users if place[user] > place[node]}
            changed.replace_all_uses_with(node, delete_user_cb=later.__contains__)
    traced.recompile()
    return True


def flatten_views(traced: fx.GraphModule) -> None:
    """Write ``x.view(x.size(0), -1)`` as ``flatten``, which does not ask for a number first."""
    for node in list(traced.graph.nodes):
        if node.target not in ("view", "reshape", torch.reshape) or len(node.args) != 3:
            continue
        source, first, rest = node.args
        if rest == -1 and isinstance(source, fx.Node) and _is_batch_size(first, source):
            with traced.graph.inserting_before(node):
                flat = traced.graph.call_function(torch.flatten, (source, 1))
            node.replace_all_uses_with(flat)
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code(lambda node: not _only_asks(node))
    traced.recompile()


def _only_asks(node: fx.Node) -> bool:
    return node.target in ("size", operator.getitem, getattr)


def _is_batch_size(size: Any, source: fx.Node) -> bool:
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return size.args == (source, 0)
    if size.target is not operator.getitem or size.args[1] != 0:
        return False
    shape = size.args[0]
    if not isinstance(shape, fx.Node):
        return False
    whole = shape.target == "size" and shape.args == (source,)
    return whole or (shape.target is getattr and shape.args == (source, "shape"))
