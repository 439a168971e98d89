"""Composable compression callbacks for PyTorch Lightning."""

from slimnets.gate import after_target as after_target
from slimnets.pruning import GradualPrune as GradualPrune
from slimnets.pruning import prune as prune
from slimnets.resume import ExactResume as ExactResume

__all__ = ["ExactResume", "GradualPrune", "after_target", "prune"]
