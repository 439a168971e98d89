"""Low-rank factorization: layers replaced by pairs of thinner ones."""

from slimnets.lowrank.callback import LowRank as LowRank
from slimnets.lowrank.callback import LowRankReplace as LowRankReplace
from slimnets.lowrank.factorize import factorize as factorize
from slimnets.lowrank.factorize import merge as merge
from slimnets.lowrank.modules import LowRankPair as LowRankPair
from slimnets.lowrank.modules import restructure as restructure
from slimnets.lowrank.plan import Plan as Plan
from slimnets.lowrank.plan import Row as Row
from slimnets.lowrank.plan import plan as plan
