"""The masks of a network's weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from slimnets.pruning.criteria import Criterion, magnitude
from slimnets.pruning.masks import lowest, zero_, zero_pruned
from slimnets.pruning.weights import Scope


class Pruner:
    """Weights, their masks and their targets; masks only grow.

    Args:
        parameters: Name to weights.
        targets: Name to the final share of zeros, in [0, 1).
        criterion: Parameter to scores of its shape; the lowest are pruned.
        scope: ``"layer"`` or ``"global"``.
        synchronize: Whether to take over the choice of rank 0, in all of several processes.

    Attributes:
        pruned: Name to bool tensor, True where pruned. It begins with the weights that are zero
            already, pruned before; unless all of a tensor are, which is an initialisation.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        targets: Mapping[str, float],
        criterion: Criterion = magnitude,
        scope: Scope = "layer",
        synchronize: bool = False,
    ) -> None:
        self.parameters = dict(parameters)
        self.targets = dict(targets)
        self.criterion = criterion
        self.scope = scope
        self.synchronize = synchronize
        self.pruned = {name: _zeros_of(weights) for name, weights in self.parameters.items()}
        self.counts = {name: int(mask.count_nonzero()) for name, mask in self.pruned.items()}
        self.thresholds: dict[str, float] = {}

    @property
    def total(self) -> int:
        """The number of weights, pruned or not."""
        return sum(weights.numel() for weights in self.parameters.values())

    @property
    def sparsity(self) -> float:
        """The share of pruned weights among all of them."""
        return sum(self.counts.values()) / self.total

    @property
    def target(self) -> float:
        """The share of pruned weights at the end."""
        return sum(k for _, k in self._quotas(self.targets)) / self.total

    @property
    def reached(self) -> bool:
        """Whether every quota is filled."""
        return all(self._count(names) >= k for names, k in self._quotas(self.targets))

    def is_of(self, network: nn.Module) -> bool:
        """Whether the weights are still those of ``network``, where layers may be replaced."""
        now = dict(network.named_parameters(remove_duplicate=False))
        return all(now.get(name) is weights for name, weights in self.parameters.items())

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The masks at one bit a weight, their shapes, and the threshold of each if it has one."""
        return {
            name: {
                "bits": torch.from_numpy(np.packbits(mask.cpu().numpy())),
                "shape": [*mask.shape],
                "threshold": self.thresholds.get(name),
            }
            for name, mask in self.pruned.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over masks from a checkpoint.

        Raises:
            ValueError: If they are not those of the weights, by name and shape.
        """
        expected = {name: tuple(weights.shape) for name, weights in self.parameters.items()}
        found = {name: tuple(packed["shape"]) for name, packed in state.items()}
        if found != expected:
            differing = sorted(dict(found.items() ^ expected.items()))
            raise ValueError(
                "the masks in the checkpoint are of another network than the one to prune; they "
                f"differ in {differing}; give GradualPrune and LowRank the arguments they had"
            )
        for name, packed in state.items():
            weights = self.parameters[name]
            bits = np.unpackbits(packed["bits"].cpu().numpy(), count=weights.numel())
            mask = torch.from_numpy(bits).to(weights.device, torch.bool)
            self.pruned[name] = mask.view(weights.shape)
            self.counts[name] = int(mask.count_nonzero())
            if packed["threshold"] is not None:
                self.thresholds[name] = packed["threshold"]

    def overfull(self) -> dict[str, float]:
        """The weights that begin with more zeros than they are to have, and the share of them."""
        return {
            name: self._count(names) / sum(self.parameters[n].numel() for n in names)
            for names, k in self._quotas(self.targets)
            for name in names
            if self._count(names) > k
        }

    def emptied(self) -> list[str]:
        """The weights none of which will be left, as there are too few for so many zeros."""
        if self.scope == "global":
            return []
        return [
            name
            for names, k in self._quotas(self.targets)
            for name in names
            if 0 < self.parameters[name].numel() <= k
        ]

    def try_criterion(self, names: Iterable[str]) -> None:
        """Raise where the criterion is none for the weights ``names``, before any is pruned.

        Raises:
            ValueError: If it returns scores of another shape.
        """
        devices = {w.device for w in self.parameters.values() if w.device.type == "cuda"}
        with torch.random.fork_rng(devices), torch.no_grad():
            for name in names:
                self._scores(name)

    @torch.no_grad()
    def grow(self, sparsities: Mapping[str, float]) -> bool:
        """Prune the weights of the lowest scores until the shares of zeros are ``sparsities``.

        Args:
            sparsities: Name to share; weights that are not named are left as they are, and if the
                scope is global, all of them.

        Returns:
            Whether any mask has grown.

        Raises:
            ValueError: If the criterion returns scores of another shape.
        """
        grown = False
        for names, k in self._quotas(sparsities):
            if k > self._count(names):
                self._select(names, k)
                for name in names:
                    zero_(self.parameters[name].detach(), self.pruned[name])
                grown = True
        return grown

    def apply(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set the pruned weights to zero, in ``parameters`` that may be a copy of the network's."""
        zero_pruned(parameters, self.pruned)

    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, so that norms are those of the live ones."""
        for name, mask in self.pruned.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                zero_(gradient, mask)

    def _quotas(self, sparsities: Mapping[str, float]) -> list[tuple[list[str], int]]:
        """Which weights are chosen from together, and how many of them."""
        sizes = {name: self.parameters[name].numel() for name in sparsities}
        if self.scope == "global":
            if len(sizes) < len(self.parameters):
                return []
            return [(list(sizes), round(min(sparsities.values()) * self.total))]
        return [([name], round(sparsities[name] * size)) for name, size in sizes.items()]

    def _count(self, names: list[str]) -> int:
        return sum(self.counts[name] for name in names)

    def _select(self, names: list[str], k: int) -> None:
        before = dict(self.counts)
        chosen, threshold = lowest([self._scores(name) for name in names], k)
        for name, mask in zip(names, chosen, strict=True):
            if self.synchronize:
                # a random criterion, or a float sum in another order, may differ from rank to rank
                dist.broadcast(mask.view(torch.uint8), src=0)
            self.pruned[name] |= mask
            self.counts[name] = int(self.pruned[name].count_nonzero())
            self.thresholds[name] = threshold
        if len(names) > 1:  # of one alone it is known from the beginning
            sizes = {name: self.parameters[name].numel() for name in names}
            warn_of_empty([n for n in names if before[n] < sizes[n] == self.counts[n]])

    def _scores(self, name: str) -> Tensor:
        weights = self.parameters[name]
        scores = self.criterion(weights)
        if not isinstance(scores, Tensor) or scores.shape != weights.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"criterion={self.criterion!r}: expected scores of the shape of {name!r}, "
                f"{tuple(weights.shape)}, got {got}"
            )
        # what is pruned comes before all that is not, which may have a score of -inf too
        lowest_finite = torch.finfo(torch.float32).min
        scores = scores.to(torch.float32).clamp(min=lowest_finite)
        return scores.masked_fill(self.pruned[name], -torch.inf)


def warn_of_empty(names: Sequence[str]) -> None:
    """Name the weights none of which are left."""
    if names:
        rank_zero_warn(
            f"pruning leaves nothing of {', '.join(map(repr, names))}, and the network may become "
            "constant: exclude such layers, give a mapping of globs as sparsity, or with "
            "scope='global' criterion=slimnets.pruning.lamp, which empties none"
        )


@torch.no_grad()
def _zeros_of(weights: nn.Parameter) -> Tensor:
    zeros = weights == 0
    return torch.zeros_like(zeros) if bool(zeros.all()) else zeros
