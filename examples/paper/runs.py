"""What is trained for the tables: a run is a network and what is done to it.

Adds nothing to the library: a run is a Trainer with callbacks, as in ``examples/cifar10.py``.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        network: A key of ``networks.NETWORKS``.
        of: The run whose network this one goes on with; None to begin with random weights.
        sparsity: The share of zeros at the end; 0 for no pruning.
        gradual: Prune gradually over the first half, or all at once at the first step.
        rank: As in ``--rank`` of ``cifar10.py``: a fraction of the full rank, "paper", or None.
        decomposition: Which way convolutions are taken apart.
        distilled: Whether the reference teaches it.
    """

    network: str = "vgg19"
    of: "Run | None" = None
    sparsity: float = 0.0
    gradual: bool = True
    rank: str | float | None = None
    decomposition: Literal["spatial", "channel"] = "spatial"
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
        """The largest of SGD's cosine, as chosen on held-out training images."""
        if self.of is not None or not self.network.startswith("vgg") or "plain" in self.network:
            return 0.01  # trained weights, and networks without batch norm, do not survive more
        return 0.05


REFERENCE = Run()
"""The dense VGG-19 that everything is compared with and taught by."""

STUDENTS = ("snn-1k", "snn-10k", "cnn-1k", "cnn-10k", "alexnet", "nin")
SPARSITIES = (0.4, 0.75, 0.875, 0.9, 0.95, 0.98, 0.99)
NARROW = "vgg19-quarter"

DENSE = Run(of=REFERENCE)
"""The reference, trained on for as long as what is compressed."""


def pruned(sparsity: float, gradual: bool = True) -> Run:
    """The reference with zeros."""
    return Run(of=REFERENCE, sparsity=sparsity, gradual=gradual)


def factorized(rank: str | float, decomposition: Literal["spatial", "channel"] = "spatial") -> Run:
    """The reference with low-rank pairs."""
    return Run(of=REFERENCE, rank=rank, decomposition=decomposition)


def combined(network: str) -> list[Run]:
    """All pairs of methods, and all three."""
    begin = REFERENCE if network == REFERENCE.network else Run(network, distilled=True)
    rank = "paper" if begin == REFERENCE else 0.5
    go_on = Run(network, of=begin)
    return [
        replace(go_on, sparsity=0.9, distilled=True),
        replace(go_on, rank=rank, distilled=True),
        replace(go_on, rank=rank, sparsity=0.9),
        replace(go_on, rank=rank, sparsity=0.9, distilled=True),
        replace(go_on, rank=rank, sparsity=0.95, distilled=True),
        replace(go_on, sparsity=0.95, distilled=True),
        replace(go_on, sparsity=0.98, distilled=True),
        replace(go_on, sparsity=0.99, distilled=True),
    ]


TABLES: dict[str, list[Run]] = {
    "gradual": [DENSE, *(pruned(s, gradual) for s in SPARSITIES for gradual in (True, False))],
    "low-rank": [
        DENSE,
        factorized("paper"),
        *(
            factorized(r, decomposition)
            for r in (0.1, 0.2, 0.4)
            for decomposition in ("spatial", "channel")
        ),  # type: ignore[arg-type]
    ],
    "students": [Run(name, distilled=taught) for name in STUDENTS for taught in (False, True)],
    "methods": [
        DENSE,
        pruned(0.75),
        pruned(0.9),
        factorized("paper"),
        Run("nin", distilled=True),
        Run(NARROW, distilled=True),
    ],
    "combined": [run for network in ("vgg19", "nin", NARROW) for run in combined(network)],
}
"""Each table's runs; what they begin with is trained first."""
