"""Distillation: the losses, and the module that trains a student beside its teacher."""

from slimnets.distillation.losses import logit_regression as logit_regression
from slimnets.distillation.losses import soft_targets as soft_targets
from slimnets.distillation.module import DistillationModule as DistillationModule
