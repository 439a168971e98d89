"""Batch norm of a traced network, put into the weights before it."""

from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from slimnets.acceleration.nodes import is_plain, is_unaltered, layer_of, module_of


def fold_batch_norm(traced: fx.GraphModule) -> None:
    """Put every batch norm that follows a convolution or linear layer into its weights."""
    uses = Counter(layer_of(node) for node in traced.graph.nodes)
    for node in list(traced.graph.nodes):
        norm = module_of(node)
        if norm is None or type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d):
            continue
        if norm.running_var is None or not is_unaltered(norm):
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        layer = module_of(source)
        if uses[str(source.target)] != 1 or not is_plain(layer):
            continue
        if isinstance(layer, nn.Linear) and len(source.meta["shape"]) != 2:
            continue  # the channels of the norm are the second dimension, not the last
        if norm.weight is None:  # which torch's fusion of linear layers does not know
            norm.weight = nn.Parameter(torch.ones_like(norm.running_var), requires_grad=False)
            norm.bias = nn.Parameter(torch.zeros_like(norm.running_var), requires_grad=False)
        fold: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        folded: nn.Module = fold(layer, norm)
        traced.set_submodule(str(source.target), folded.requires_grad_(False))
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
