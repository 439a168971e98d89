"""Pruning: schedules, criteria, masks, and the callback that stacks them on a Trainer."""

from slimnets.pruning.at_once import keep_zeros as keep_zeros
from slimnets.pruning.at_once import prune as prune
from slimnets.pruning.callback import GradualPrune as GradualPrune
from slimnets.pruning.criteria import lamp as lamp
from slimnets.pruning.criteria import magnitude as magnitude
from slimnets.pruning.criteria import random as random
from slimnets.pruning.schedules import cubic as cubic
from slimnets.pruning.schedules import linear as linear
from slimnets.pruning.schedules import one_shot as one_shot
from slimnets.pruning.weights import prunable_weights as prunable_weights
