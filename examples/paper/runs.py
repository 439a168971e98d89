"""What is trained for the tables: a run is a network and what is done to it.

Adds nothing to the library: a run is a Trainer with callbacks, as in ``examples/cifar10.py``.
"""

from dataclasses import dataclass, replace
from typing import Literal

Decomposition = Literal["spatial", "channel"]
Scope = Literal["layer", "global", "lamp"]
WAYS: tuple[Decomposition, ...] = ("spatial", "channel")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        network: A key of ``networks.NETWORKS``.
        of: The run whose network this one goes on with; None to begin with random weights.
        sparsity: The share of zeros at the end, or a key of :data:`TAPERED` for one of each layer;
            0 for no pruning.
        gradual: Prune gradually over the first three quarters, or all at once at the first step.
        scope: Whether all layers are equally sparse, or the smallest weights of the network go, or
            those of the lowest scores of LAMP.
        rank: As in ``--rank`` of ``cifar10.py``: a fraction of the full rank, "paper", or None.
        budget: In place of it: the share of their weights that all layers have together.
        decomposition: Which way convolutions are taken apart.
        distilled: Whether the reference teaches it.
        beside: Runs that teach it together with the reference, by the mean of all logits
            (Hinton, Vinyals and Dean 2015, arXiv 1503.02531, distil an ensemble).
    """

    network: str = "vgg19"
    of: "Run | None" = None
    sparsity: str | float = 0.0
    gradual: bool = True
    scope: Scope = "layer"
    rank: str | float | None = None
    budget: float | None = None
    decomposition: Decomposition = "spatial"
    distilled: bool = False
    beside: "tuple[Run, ...]" = ()

    @property
    def name(self) -> str:
        """What its files are called."""
        parts = [self.network] if self.of is None else [self.of.name, "then"]
        if self.sparsity:
            share = self.sparsity if isinstance(self.sparsity, str) else f"{100 * self.sparsity:g}"
            scope = "" if self.scope == "layer" else self.scope
            parts.append(f"{'gradual' if self.gradual else 'oneshot'}{share}{scope}")
        if self.rank:
            parts.append(f"{self.decomposition}{self.rank}")
        if self.budget:
            parts.append(f"{self.decomposition}budget{self.budget:g}")
        if self.distilled:
            parts.append(f"distilled{len(self.teachers) if self.beside else ''}")
        return "-".join([*parts, "dense"] if parts[-1] == "then" else parts)

    @property
    def teachers(self) -> "tuple[Run, ...]":
        """All that teach it."""
        return (REFERENCE, *self.beside) if self.distilled else ()

    @property
    def begins_with(self) -> "tuple[Run, ...]":
        """The runs that have to be finished before it begins."""
        return (*self.teachers, *((self.of,) if self.of else ()))

    @property
    def learning_rate(self) -> float:
        """The largest of the cycle: the paper's with batch norm, a third of it without.

        With 10,000 hidden units one of three seeds of ``snn-10k-distilled`` collapsed at that third
        (``--epochs 4 --learning-rate 0.03``); these have a tenth. The third was chosen by
        ``reproduce.py all --only RUN --epochs 3 --learning-rate RATE --seeds 1 --held-out 5000
        --answers 2 --reference FILE --reference-epochs 33``, each with a ``--folder`` of its own.
        Rates to go on with a trained network are guesses. ``nin`` learns faster in small batches:
        ``--epochs 0.5 --batch-size 32 --answers 4``, below * with ``--batch-size 128``.

        ================  =======  ======  =======  =======  ======
        run                  0.01    0.02     0.03     0.05     0.1
        ================  =======  ======  =======  =======  ======
        cnn-1k             50.0 %           56.4 %           48.4 %
        cnn-1k-distilled                    58.6 %
        snn-1k-distilled                    62.1 %
        nin                36.7 %  40.2 %   41.3 %
        nin-distilled      40.1 %  40.3 %
        nin *                               34.0 %   33.8 %
        nin-distilled *    32.4 %
        ================  =======  ======  =======  =======  ======
        """
        if self.of is not None or self.network in WIDE:
            return 0.01
        return 0.03 if self.network in STUDENTS else 0.1


def needed(run: Run) -> list[Run]:
    """The run, after those that it goes on with or learns from."""
    return [*(one for before in run.begins_with for one in needed(before)), run]


REFERENCE = Run()
"""The dense VGG-19 that everything is compared with and taught by."""

DISTILLATION = {"alpha": 0.5, "temperature": 2.0}
"""Arguments of the DistillationModule: the reference errs, so that labels have half a say."""

# The paper's, without batch norm.
STUDENTS = ("snn-1k", "snn-10k", "cnn-1k", "cnn-10k", "alexnet", "nin")
WIDE = ("snn-10k", "cnn-10k")
SPARSITIES = (0.4, 0.75, 0.875, 0.9, 0.95, 0.98, 0.99)
NARROW, RESIDUAL, MEDIUM = "vgg19-quarter", "resnet10-small", "resnet10-medium"
KEPT = {RESIDUAL: ("0",), MEDIUM: ("0",)}
"""Layers that are left dense, by network: the first convolution is small, and all rests on it."""

TAPERED = {
    "tapered": {
        RESIDUAL: {"3": 0.82, "7": 0.82, "8": 0.86, "12": 0.88, "13": 0.91, "17": 0.932, "20": 0.5},
        MEDIUM: {"3": 0.87, "7": 0.87, "8": 0.9, "12": 0.9, "13": 0.915, "17": 0.941, "20": 0.5},
    },
    "tapered-more": {  # for a file of a 500th of the dense one's bytes
        MEDIUM: {"3": 0.87, "7": 0.87, "8": 0.9, "12": 0.9, "13": 0.915, "17": 0.944, "20": 0.5},
    },
}
"""Zeros of residual networks' layers: early ones have few weights, which are used often."""

AT_ONCE = Run(RESIDUAL, sparsity="tapered", distilled=True)
"""Distilled and pruned at once, on one Trainer."""

WIDER = Run(MEDIUM, sparsity="tapered", distilled=True)
"""The same with more channels, and about as many weights."""

BESIDE = (AT_ONCE, WIDER)
"""Who teaches beside the reference, where more than it does."""

BY_ALL = replace(WIDER, sparsity="tapered-more", beside=BESIDE)
"""Taught by the two before it, too (born again: Furlanello et al. 2018, arXiv 1805.04770)."""

BEST = BY_ALL
"""The combination that is compared with the paper's, and whose file is kept here."""

LARGE = (Run("resnet10"),)
"""Who teaches beside the reference where a GPU trains: a network that learns better than it."""

BY_TWO = replace(BY_ALL, beside=LARGE)
"""As the best, taught by that."""

COMBINED = (BEST, BY_TWO)
"""What combines most, of each way of training."""

SMALL = Run("cnn-1k")
"""A network that a CPU trains in minutes, pruned and factorized in the same ways."""

RANKS = (0.1, 0.2, 0.4)
BUDGETS = (0.05, 0.1, 0.2, 0.4)


def pruned(
    sparsity: float,
    gradual: bool = True,
    of: Run = REFERENCE,
    scope: Scope = "layer",
    distilled: bool = False,
    beside: tuple[Run, ...] = (),
) -> Run:
    """A trained network with zeros."""
    return Run(of.network, of, sparsity, gradual, scope, distilled=distilled, beside=beside)


def factorized(
    rank: str | float | None = None,
    decomposition: Decomposition = "spatial",
    of: Run = REFERENCE,
    distilled: bool = False,
    beside: tuple[Run, ...] = (),
    budget: float | None = None,
) -> Run:
    """A trained network with low-rank pairs."""
    return Run(
        of.network,
        of,
        rank=rank,
        budget=budget,
        decomposition=decomposition,
        distilled=distilled,
        beside=beside,
    )


def trained_on(of: Run) -> Run:
    """A trained network, for as long again as those that are compressed."""
    return Run(of.network, of)


def again(run: Run) -> Run:
    """A compressed network, trained on in the same way: its zeros stay, and so do its pairs."""
    return replace(run, of=run, rank=None, budget=None)


CONTROL = trained_on(REFERENCE)
"""What the reference becomes in the epochs that what is made of it is trained for."""

PRUNED_BY_THREE, PRUNED_BY_TWO = (
    {
        sparsity: pruned(sparsity, scope="global", distilled=True, beside=beside)
        for sparsity in sparsities
    }
    for beside, sparsities in ((BESIDE, (0.75, 0.95)), (LARGE, (0.75, 0.875, 0.95)))
)
FACTORIZED_BY_THREE, FACTORIZED_BY_TWO = (
    factorized("paper", distilled=True, beside=beside) for beside in (BESIDE, LARGE)
)
"""Taught by the reference and others."""


def prunings(of: Run) -> list[Run]:
    """A trained network, pruned gradually and at once."""
    both = [pruned(sparsity, gradual, of) for sparsity in SPARSITIES for gradual in (True, False)]
    return [trained_on(of), *both]


def factorizations(of: Run) -> list[Run]:
    """A trained network with low-rank pairs of both kinds."""
    return [
        trained_on(of),
        *(factorized(rank, way, of) for rank in RANKS for way in WAYS),
        *(factorized(None, way, of, budget=budget) for budget in BUDGETS for way in WAYS),
    ]


def combined(
    network: str,
    rank: str | float | None,
    *sparsities: float,
    budget: float | None = None,
    scope: Scope = "layer",
) -> list[Run]:
    """All pairs of methods, and all three, with the first of ``sparsities``; then with others."""
    alone, taught = Run(network), Run(network, distilled=True)
    if network == REFERENCE.network:
        alone = taught = REFERENCE
    first, *others = sparsities
    pairs = Run(network, taught, rank=rank, budget=budget, distilled=True)
    both = replace(pairs, sparsity=first, scope=scope)
    zeros = replace(both, rank=None, budget=None)
    return [
        both,
        zeros,
        pairs,
        replace(both, of=alone, distilled=False),
        Run(network, taught, distilled=True),  # trained for as long
        *(replace(zeros, sparsity=other) for other in others),
        *(replace(both, sparsity=other) for other in others),
    ]


TABLES: dict[str, list[Run]] = {
    "reference": [REFERENCE],
    "gradual": [
        *(
            pruned(sparsity, scope="global", distilled=taught)
            for sparsity in (0.75, 0.875, 0.95)
            for taught in (False, True)
        ),
        *PRUNED_BY_THREE.values(),
        *map(again, PRUNED_BY_THREE.values()),
        *PRUNED_BY_TWO.values(),
        *prunings(REFERENCE),
        *(pruned(sparsity, scope="lamp") for sparsity in SPARSITIES),
    ],
    "gradual-cnn": prunings(SMALL),
    "low-rank": [
        factorized("paper"),
        factorized("paper", distilled=True),
        FACTORIZED_BY_THREE,
        again(FACTORIZED_BY_THREE),
        again(again(FACTORIZED_BY_THREE)),
        FACTORIZED_BY_TWO,
        *factorizations(REFERENCE),
    ],
    "low-rank-cnn": factorizations(SMALL),
    "students": [Run(name, distilled=taught) for name in STUDENTS for taught in (False, True)],
    "methods": [
        trained_on(REFERENCE),
        pruned(0.75),
        pruned(0.9),
        factorized("paper"),
        Run("nin", distilled=True),
        pruned(0.75, of=Run("nin", distilled=True), distilled=True),
        Run(NARROW, distilled=True),
        Run(RESIDUAL, distilled=True),
    ],
    "stacked": [  # all at once, on one Trainer
        AT_ONCE,
        WIDER,
        BY_ALL,
        BY_TWO,
        *LARGE,
        Run(RESIDUAL, sparsity=0.91, distilled=True),
        Run(RESIDUAL, rank=0.3, sparsity=0.8, distilled=True),
        Run(RESIDUAL, distilled=True),
        Run(RESIDUAL, sparsity="tapered"),
        Run(RESIDUAL),
    ],
    "combined-residual": [
        *combined(RESIDUAL, 0.3, 0.91, 0.8),
        *combined(RESIDUAL, None, 0.9, budget=0.5, scope="lamp"),
    ],
    "combined-vgg19": [
        *combined("vgg19", "paper", 0.9, 0.95, 0.98, 0.99),
        *combined("vgg19", None, 0.75, 0.9, budget=0.1, scope="lamp"),
    ],
    "combined-nin": combined("nin", 0.3, 0.75, 0.4, 0.875),
    "combined-cnn": combined("cnn-1k", 0.3, 0.75, 0.9),
    "combined-narrow": combined(NARROW, 0.3, 0.9, 0.95),
}
"""Each table's runs; what they begin with is trained first."""
