"""Pruning without a Trainer."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from slimnets.layers import compressed_network
from slimnets.pruning.criteria import Criterion, check_criterion, magnitude
from slimnets.pruning.masks import zero_pruned
from slimnets.pruning.pruner import Pruner, warn_of_empty
from slimnets.pruning.weights import (
    Scope,
    Sparsity,
    check_scope,
    check_sparsity,
    left_unasked,
    target_sparsity,
)
from slimnets.selectors import Selectors, as_selectors

log = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    sparsity: Sparsity,
    *,
    criterion: Criterion = magnitude,
    scope: Scope = "layer",
    exclude: Selectors = (),
) -> dict[str, Tensor]:
    """Prune ``model`` at once and in place, without a Trainer.

    Args:
        model: The network; of a DistillationModule, its student.
        sparsity: A fraction in [0, 1), or a mapping of globs over layer names to fractions, of
            which the first that matches wins.
        criterion: Parameter to scores of its shape; the lowest are pruned.
        scope: ``"layer"`` for the same sparsity in every layer, ``"global"`` for the lowest scores
            of the whole network, which ``lamp`` makes comparable.
        exclude: Layers to leave alone: globs, types, with what is within them, or predicates of
            (name, layer).

    Returns:
        Name of each weight to its mask, bool, True where the weight is kept.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range, a glob matches nothing, or a weight has no values.

    Examples:
        >>> masks = prune(nn.Linear(4, 4), 0.75)
        >>> int(masks["weight"].sum())
        4
    """
    check_sparsity(sparsity)
    check_scope(scope, sparsity)
    check_criterion(criterion)
    network, exclude = compressed_network(model), as_selectors(exclude)
    parameters, targets = target_sparsity(network, sparsity, exclude)
    if empty := [name for name, weights in parameters.items() if weights.is_meta]:
        raise ValueError(f"model: {empty[0]!r} is on the meta device, without values to prune")
    pruner = Pruner(parameters, targets, criterion, scope)
    pruner.try_criterion(parameters)
    for what in left_unasked(network, sparsity, exclude):
        log.warning("prune leaves %s", what)
    warn_of_empty(pruner.emptied())
    pruner.grow(targets)
    pruner.apply(parameters)
    return {name: ~pruned for name, pruned in pruner.pruned.items()}


def keep_zeros(
    model: nn.Module, masks: Mapping[str, Tensor], optimizer: Optimizer
) -> RemovableHandle:
    """Set what ``masks`` prune to zero after every step of ``optimizer``, without a Trainer.

    Args:
        model: As for :func:`prune`.
        masks: What :func:`prune` returned: name of each weight to a bool tensor of its shape, True
            where the weight is kept.
        optimizer: One of torch's, or of Fabric's.

    Returns:
        A handle; its ``remove()`` ends it.

    Raises:
        TypeError: If a mask is not of bools, or ``optimizer`` is none.
        ValueError: If ``model`` has no weight of a name and shape of ``masks``.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> handle = keep_zeros(layer, prune(layer, 0.75), optimizer)
        >>> for _ in range(3):
        ...     layer(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        >>> int((layer.weight == 0).sum())
        12
    """
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer={kind}: expected one of torch.optim's, or of Fabric's")
    own = dict(compressed_network(model).named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if mask.dtype is not torch.bool:  # whose ~ would be other bits, not the other weights
            raise TypeError(f"masks[{name!r}]: expected bool, got {mask.dtype}; give mask.bool()")
        if name not in own or own[name].shape != mask.shape:
            raise ValueError(
                f"masks[{name!r}]: {type(model).__name__} has no weight of this name and shape "
                f"{tuple(mask.shape)}"
            )
    pruned = {name: (~mask).to(own[name].device) for name, mask in masks.items()}
    return optimizer.register_step_post_hook(lambda *_: zero_pruned(own, pruned))
