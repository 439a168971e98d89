"""What is trained for the tables: a run is a network and what is done to it.

Adds nothing to the library: a run is a Trainer with callbacks, as in ``examples/cifar10.py``.
"""

from dataclasses import dataclass, replace
from typing import Literal

Decomposition = Literal["spatial", "channel"]
WAYS: tuple[Decomposition, ...] = ("spatial", "channel")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        network: A key of ``networks.NETWORKS``.
        of: The run whose network this one goes on with; None to begin with random weights.
        sparsity: The share of zeros at the end; 0 for no pruning.
        gradual: Prune gradually over the first three quarters, or all at once at the first step.
        rank: As in ``--rank`` of ``cifar10.py``: a fraction of the full rank, "paper", or None.
        decomposition: Which way convolutions are taken apart.
        distilled: Whether the reference teaches it.
    """

    network: str = "vgg19"
    of: "Run | None" = None
    sparsity: float = 0.0
    gradual: bool = True
    rank: str | float | None = None
    decomposition: Decomposition = "spatial"
    distilled: bool = False

    @property
    def name(self) -> str:
        """What its files are called."""
        parts = [self.network] if self.of is None else [self.of.name, "then"]
        if self.sparsity:
            parts.append(f"{'gradual' if self.gradual else 'oneshot'}{100 * self.sparsity:g}")
        if self.rank:
            parts.append(f"{self.decomposition}{self.rank}")
        if self.distilled:
            parts.append("distilled")
        return "-".join([*parts, "dense"] if parts[-1] == "then" else parts)

    @property
    def learning_rate(self) -> float:
        """The largest of the cycle; distillation's gradients are about twice as large.

        Compared with ``students --only cnn-1k cnn-1k-distilled --epochs 3 --held-out 5000
        --learning-rate RATE``: alone 50.0 % at 0.01, 56.4 % at 0.03, 48.4 % at 0.1; distilled
        58.2 % at 0.01, 45.2 % at 0.03. The others are guesses.
        """
        if self.of is not None:
            return 0.01
        if self.network in STUDENTS:
            return 0.01 if self.distilled else 0.03
        return 0.03 if self.distilled else 0.06


REFERENCE = Run()
"""The dense VGG-19 that everything is compared with and taught by."""

# The paper's, without batch norm.
STUDENTS = ("snn-1k", "snn-10k", "cnn-1k", "cnn-10k", "alexnet", "nin")
SPARSITIES = (0.4, 0.75, 0.875, 0.9, 0.95, 0.98, 0.99)
NARROW, RESIDUAL = "vgg19-quarter", "resnet10-small"
KEPT = {RESIDUAL: ("0",)}
"""Layers that are left dense, by network: the first convolution is small, and all rests on it."""

HEADLINE = Run(RESIDUAL, sparsity=0.91, distilled=True)
"""The combination that is compared with the paper's."""

SMALL = Run("cnn-1k")
"""A network that a CPU trains in minutes, pruned and factorized in the same ways."""

RANKS = (0.1, 0.2, 0.4)


def pruned(sparsity: float, gradual: bool = True, of: Run = REFERENCE) -> Run:
    """A trained network with zeros."""
    return Run(of.network, of, sparsity, gradual)


def factorized(
    rank: str | float, decomposition: Decomposition = "spatial", of: Run = REFERENCE
) -> Run:
    """A trained network with low-rank pairs."""
    return Run(of.network, of, rank=rank, decomposition=decomposition)


def trained_on(of: Run) -> Run:
    """A trained network, for as long again as those that are compressed."""
    return Run(of.network, of)


def prunings(of: Run) -> list[Run]:
    """A trained network, pruned gradually and at once."""
    both = [pruned(sparsity, gradual, of) for sparsity in SPARSITIES for gradual in (True, False)]
    return [trained_on(of), *both]


def factorizations(of: Run) -> list[Run]:
    """A trained network with low-rank pairs of both kinds."""
    return [trained_on(of), *(factorized(rank, way, of) for rank in RANKS for way in WAYS)]


def combined(network: str, rank: str | float, *sparsities: float) -> list[Run]:
    """All pairs of methods, and all three, with the first of ``sparsities``; then with others."""
    go_on = Run(network, of=REFERENCE if network == "vgg19" else Run(network, distilled=True))
    first, *others = sparsities
    return [
        replace(go_on, rank=rank, sparsity=first, distilled=True),
        replace(go_on, sparsity=first, distilled=True),
        replace(go_on, rank=rank, distilled=True),
        replace(go_on, rank=rank, sparsity=first),
        *(replace(go_on, sparsity=other, distilled=True) for other in others),
        *(replace(go_on, rank=rank, sparsity=other, distilled=True) for other in others),
    ]


TABLES: dict[str, list[Run]] = {
    "gradual": prunings(REFERENCE),
    "gradual-cnn": prunings(SMALL),
    "low-rank": [factorized("paper"), *factorizations(REFERENCE)],
    "low-rank-cnn": factorizations(SMALL),
    "students": [Run(name, distilled=taught) for name in STUDENTS for taught in (False, True)],
    "methods": [
        trained_on(REFERENCE),
        pruned(0.75),
        pruned(0.9),
        factorized("paper"),
        Run("nin", distilled=True),
        Run(NARROW, distilled=True),
        Run(RESIDUAL, distilled=True),
    ],
    "stacked": [  # all at once, from random weights, on one Trainer
        HEADLINE,
        Run(RESIDUAL, rank=0.3, sparsity=0.8, distilled=True),
        Run(RESIDUAL, distilled=True),
        Run(RESIDUAL),
    ],
    "combined-residual": combined(RESIDUAL, 0.3, 0.91, 0.8),
    "combined-vgg19": combined("vgg19", "paper", 0.9, 0.95, 0.98, 0.99),
    "combined-nin": combined("nin", 0.3, 0.75, 0.4, 0.875),
    "combined-cnn": combined("cnn-1k", 0.3, 0.75, 0.9),
    "combined-narrow": combined(NARROW, 0.3, 0.9, 0.95),
}
"""Each table's runs; what they begin with is trained first."""
