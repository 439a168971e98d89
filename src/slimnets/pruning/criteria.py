"""Criteria: how much each weight of a parameter is worth.

A criterion is any callable from a parameter to a tensor of scores of the same shape; the weights
with the lowest scores are pruned first. Scores are compared in float32, across layers where pruning
is global.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

Criterion: TypeAlias = Callable[[nn.Parameter], Tensor]


def magnitude(parameter: nn.Parameter) -> Tensor:
    """The absolute value (Han et al., arXiv 1506.02626).

    Args:
        parameter: Weights of any shape.

    Returns:
        Scores of the same shape.
    """
    return parameter.detach().abs()


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
