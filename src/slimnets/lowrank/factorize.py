"""Layers into low-rank pairs and back, without a Trainer."""

import logging
from collections.abc import Mapping
from typing import cast

from torch import nn

from slimnets.layers import compressed_network, paths_in, replace
from slimnets.lowrank.decompose import Decomposition
from slimnets.lowrank.modules import pairs_of
from slimnets.lowrank.pair import Layer, make_dense, make_pair
from slimnets.lowrank.plan import Rank, plan
from slimnets.selectors import Selectors

log = logging.getLogger(__name__)


def factorize(
    model: nn.Module,
    r: Rank | Mapping[str, Rank] | None = None,
    *,
    energy: float | None = None,
    budget: float | None = None,
    decomposition: Decomposition = "spatial",
    exclude: Selectors = (),
) -> nn.Module:
    """Put low-rank pairs in the place of layers, keeping what was learned as well as they can.

    Linear layers and ungrouped one- and two-dimensional convolutions are replaced, each by the
    pair whose product is nearest to its weight in the Frobenius norm. A pair that would not be
    smaller is not made, and pairs that are there already are left. What is left for another reason
    than the arguments is logged; :func:`slimnets.lowrank.plan` tells it beforehand.

    Args:
        model: A network, a LightningModule or a DistillationModule (its student is factorized);
            compiled by :func:`torch.compile` or not. It is changed in place, unless it is itself a
            layer: then the result is another object.
        r: The rank; a fraction of each layer's full rank in (0, 1); or a mapping of globs over
            layer names to either, of which the first that matches counts and the others are left.
        energy: In place of ``r``: the share of the squared singular values that each layer keeps,
            in (0, 1).
        budget: In place of ``r``: the share of their weights that the layers keep together, in
            (0, 1). Ranks are chosen layer by layer, for as much as possible of what all of them
            compute (:func:`slimnets.lowrank.budget.ranks_for_budget`).
        decomposition: ``"spatial"`` turns a d x d convolution into d x 1 and 1 x d (Tai et al.,
            arXiv 1511.06067), ``"channel"`` into d x d and 1 x 1.
        exclude: Layers to leave: globs, types, with what is within them, or predicates of
            (name, layer).

    Returns:
        The model.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range, a glob matches nothing, a weight is not finite, or the
            budget is too small for any pairs; the model is unchanged.

    Examples:
        >>> net = factorize(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()), r=8)
        >>> net[0].rank, tuple(net[0].first.weight.shape), tuple(net[0].second.weight.shape)
        (8, (8, 16, 3, 1), (32, 8, 1, 3))
    """
    todo = plan(
        model, r, energy=energy, budget=budget, decomposition=decomposition, exclude=exclude
    )
    if todo.left:
        left = "; ".join(f"{row.name!r} ({row.reason})" for row in todo.left)
        log.warning("factorize left %d of %d layers: %s", len(todo.left), len(todo.rows), left)
    return put_pairs(model, paths_in(model, todo.ranks), decomposition)


def put_pairs(
    model: nn.Module, ranks: Mapping[str, int], decomposition: Decomposition = "spatial"
) -> nn.Module:
    """Put a pair of the given rank in the place of each layer named; the model is returned."""
    pairs = {
        name: make_pair(cast(Layer, model.get_submodule(name)), rank, decomposition)
        for name, rank in ranks.items()
    }
    for name, pair in pairs.items():
        model = replace(model, name, pair)
    return model


def merge(model: nn.Module) -> nn.Module:
    """Turn every low-rank pair of ``model`` back into a dense layer that computes the same.

    Args:
        model: As for :func:`factorize`; changed in place, unless it is itself a pair: then the
            result is another object.

    Returns:
        The model.

    Examples:
        >>> merge(factorize(nn.Linear(64, 64), r=8))
        Linear(in_features=64, out_features=64, bias=True)
    """
    pairs = pairs_of(compressed_network(model))
    dense = {name: make_dense(pair) for name, pair in pairs.items()}
    for path, layer in paths_in(model, dense).items():
        model = replace(model, path, layer)
    return model
