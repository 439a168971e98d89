"""One number of weights for all layers together: the ranks that make the most of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

ROUNDING = torch.finfo(torch.float32).eps ** 2
"""Shares of energy of which nothing is known: a merged pair of rank 4 has four above it."""


def ranks_for_budget(
    energies: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int]:
    """The ranks of pairs that have at most ``budget`` weights together and keep most.

    A signal passes through one layer after the other, so what is made as large as the budget
    allows is the product, over layers, of the share of its energy that each keeps. The logarithm
    of a share is concave in the rank: rank after rank goes to the layer in which it adds most to
    the logarithm for each weight that it costs. Of the budget less is left over than a rank costs.

    Args:
        energies: Of each layer's matrix, as of :func:`slimnets.lowrank.decompose.energies`.
        shapes: The two sides of that matrix, which a rank costs as many weights as.
        budget: At least the weights of pairs of rank 1.

    Returns:
        Name of each layer, and its rank. One whose pair would have as many weights as the layer,
        or more, is to be left dense: it is counted with its own.
    """
    gains, costs, owners = [], [], []
    for owner, (name, shares) in enumerate(energies.items()):
        rows, columns = shapes[name]
        used = shares[shares > ROUNDING]
        weights = ((rows + columns) * torch.arange(1, len(used) + 1)).clamp(max=rows * columns)
        gains.append(used.cumsum(0).log().diff() / (rows + columns))
        costs.append(weights.diff())
        owners.append(torch.full_like(costs[-1], owner))
    if not energies:
        return {}
    order = torch.cat(gains).argsort(descending=True, stable=True)
    spent = least_weights(shapes) + torch.cat(costs)[order].cumsum(0)
    bought = torch.cat(owners)[order[spent <= budget]]
    ranks = 1 + bought.bincount(minlength=len(energies))
    return dict(zip(energies, ranks.tolist(), strict=True))


def least_weights(shapes: Mapping[str, tuple[int, int]]) -> int:
    """The least that pairs for matrices of these shapes can have."""
    return sum(min(rows + columns, rows * columns) for rows, columns in shapes.values())
