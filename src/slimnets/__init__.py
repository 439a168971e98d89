"""Composable compression callbacks for PyTorch Lightning."""

from slimnets.pruning import GradualPrune as GradualPrune
from slimnets.pruning import prune as prune

__all__ = ["GradualPrune", "prune"]
