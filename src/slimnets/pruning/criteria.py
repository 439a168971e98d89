"""Criteria: how much each weight of a parameter is worth.

A criterion is any callable from a parameter to a tensor of scores of the same shape; the weights
with the lowest scores are pruned first. Scores are compared in float32, across layers where pruning
is global.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

Criterion: TypeAlias = Callable[[nn.Parameter], Tensor]

_LOWER_BITS = 12  # of the 23 of a float32 behind the point
_BIN_OF_ONE = 0x3F800000 >> _LOWER_BITS


def magnitude(parameter: nn.Parameter) -> Tensor:
    """The absolute value (Han et al., arXiv 1506.02626).

    Args:
        parameter: Weights of any shape.

    Returns:
        Scores of the same shape.
    """
    return parameter.detach().abs()


def lamp(parameter: nn.Parameter) -> Tensor:
    """Layer-adaptive magnitude (Lee et al., arXiv 2010.07611), for ``scope="global"``.

    The square of a weight, over the sum of the squares of all weights of the layer that are as
    large or larger (those within a 2,000th of it are): what the layer loses with it, of what is
    left. Scales of layers make no difference, and no layer is emptied, since the largest weight of
    each is worth 1. Within a layer the order is that of the magnitude.

    Args:
        parameter: Weights of any shape.

    Returns:
        Scores of the same shape, float32, in [0, 1] up to rounding.

    Examples:
        >>> lamp(nn.Parameter(torch.tensor([2.0, -1.0, 0.0, 4.0]))).mul(21).round().tolist()
        [4.0, 1.0, 0.0, 21.0]
    """
    weights = parameter.detach().abs().float()
    finite = weights.nan_to_num(nan=0.0, posinf=0.0)
    weights = weights / finite.max().clamp(min=torch.finfo(torch.float32).tiny)
    # Floats are in the order of their bits. A histogram over the upper ones takes a tenth of the
    # time of a sort, and is the same on every device.
    bins = (weights.view(torch.int32) >> _LOWER_BITS).clamp(max=_BIN_OF_ONE)
    counts = bins.flatten().bincount(minlength=_BIN_OF_ONE + 1).cpu()
    left = (counts * _squares_of_bins()).flip(0).cumsum(0).flip(0)
    left = left.clamp(min=torch.finfo(torch.float32).tiny).float().to(weights.device)
    return weights.square() / left[bins]


@cache  # of every layer the same
def _squares_of_bins() -> Tensor:
    bins = torch.arange(_BIN_OF_ONE + 1, dtype=torch.int32, device="cpu")
    return (bins << _LOWER_BITS).view(torch.float32).double().square()


def random(parameter: nn.Parameter) -> Tensor:
    """Uniform noise from torch's global generator: the baseline that a criterion has to beat.

    Args:
        parameter: Weights of any shape.

    Returns:
        Scores of the same shape, float32, in [0, 1).
    """
    return torch.rand_like(parameter.detach(), dtype=torch.float32)


def check_criterion(criterion: object) -> None:
    """Raise unless ``criterion`` can be called.

    Raises:
        TypeError: If it cannot.
    """
    if not callable(criterion):
        raise TypeError(
            f"criterion={criterion!r}: expected a callable of a parameter, such as "
            "slimnets.pruning.magnitude"
        )
