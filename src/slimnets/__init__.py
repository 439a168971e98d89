"""Composable compression callbacks for PyTorch Lightning."""

from slimnets.acceleration import accelerate as accelerate
from slimnets.acceleration import export as export
from slimnets.artifact import ArtifactError as ArtifactError
from slimnets.artifact import convert_checkpoint as convert_checkpoint
from slimnets.artifact import load as load
from slimnets.artifact import save as save
from slimnets.distillation import DistillationModule as DistillationModule
from slimnets.gate import after_target as after_target
from slimnets.inspection.summary import summarize as summarize
from slimnets.lowrank import LowRank as LowRank
from slimnets.lowrank import LowRankReplace as LowRankReplace
from slimnets.lowrank import factorize as factorize
from slimnets.lowrank import merge as merge
from slimnets.pruning import GradualPrune as GradualPrune
from slimnets.pruning import keep_zeros as keep_zeros
from slimnets.pruning import prune as prune
from slimnets.resume import ExactResume as ExactResume

__all__ = [
    "ArtifactError",
    "DistillationModule",
    "ExactResume",
    "GradualPrune",
    "LowRank",
    "LowRankReplace",
    "accelerate",
    "after_target",
    "convert_checkpoint",
    "export",
    "factorize",
    "keep_zeros",
    "load",
    "merge",
    "prune",
    "save",
    "summarize",
]
