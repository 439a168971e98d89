"""The layers of a network as rows of numbers."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from slimnets.artifact.container import stored_bytes
from slimnets.inspection.macs import Macs, nonzeros
from slimnets.lowrank.modules import LowRankPair, weights_of


@dataclass(frozen=True)
class Row:
    """One layer, or the whole network.

    Attributes:
        name: The layer's name in the network, as in ``named_modules()``.
        kind: Its type.
        weights: Elements of its parameters of two or more dimensions: of what pruning and low rank
            act on, and of embeddings and other tables, which they leave as they are. Biases and
            norms are in ``bytes`` only. Weights that layers share count once, where they come
            first.
        nonzeros: How many of them are not zero.
        bytes: What its tensors take in the file of ``slimnets.save``, buffers included.
        rank: The rank of a factorized pair, which is one layer here.
        dead_channels: Output channels all of whose weights are zero; None if it has no channels.
        macs: Multiply-accumulate operations for the example input; None without one.
        effective_macs: Those of them whose weight is not zero.
    """

    name: str
    kind: str
    weights: int = 0
    nonzeros: int = 0
    bytes: int = 0
    rank: int | None = None
    dead_channels: int | None = None
    macs: int | None = None
    effective_macs: int | None = None

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights, in [0, 1].

        Of a network with embeddings or layers that are not pruned, it is below the ``sparsity``
        that GradualPrune logs, which is the share among the weights that it prunes.
        """
        return 1 - self.nonzeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The row as a flat dictionary."""
        return {**asdict(self), "sparsity": self.sparsity}


@torch.no_grad()
def count_rows(network: nn.Module, macs: Mapping[str, Macs] | None = None) -> tuple[Row, ...]:
    """One row for each layer of ``network`` that owns tensors or multiplies.

    Args:
        network: The network.
        macs: Module name to its operations, if they have been counted.
    """
    layers = _layers(network)
    sizes = _sizes(network)
    owners: dict[nn.Parameter, str] = {}
    rows = []
    for name, layer in layers.items():
        inside = _paths(name, layer)
        own = weights_of(layer)
        tied = {owners[weight]: None for weight in own if weight in owners}
        new = [weight for weight in dict.fromkeys(own) if weight not in owners]
        owners.update(dict.fromkeys(new, name))
        counts = [macs[path] for path in inside if path in macs] if macs is not None else None
        row = Row(
            name=name,
            kind=type(layer).__name__ + (f" tied to {', '.join(tied)}" if tied else ""),
            weights=sum(weight.numel() for weight in new),
            nonzeros=sum(map(nonzeros, new)),
            bytes=sum(sizes.get(path, 0) for path in inside),
            rank=layer.rank if isinstance(layer, LowRankPair) else None,
            dead_channels=_dead_channels(layer),
            macs=sum(one.dense for one in counts) if counts is not None else None,
            effective_macs=sum(one.effective for one in counts) if counts is not None else None,
        )
        if own or row.bytes or row.macs:
            rows.append(row)
    return tuple(rows)


def total(rows: Iterable[Row], kind: str) -> Row:
    """The sum of ``rows``; what none of them knows stays unknown."""
    rows = list(rows)

    def known(field: str) -> int | None:
        values = [value for row in rows if (value := getattr(row, field)) is not None]
        return sum(values) if values else None

    return Row(
        name="total",
        kind=kind,
        weights=sum(row.weights for row in rows),
        nonzeros=sum(row.nonzeros for row in rows),
        bytes=sum(row.bytes for row in rows),
        dead_channels=known("dead_channels"),
        macs=known("macs"),
        effective_macs=known("effective_macs"),
    )


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    """Name to module; what is inside of a factorized pair belongs to the pair."""
    modules = dict(network.named_modules())
    inside = {
        path
        for name, layer in modules.items()
        if isinstance(layer, LowRankPair)
        for path in _paths(name, layer)[1:]
    }
    return {name: layer for name, layer in modules.items() if name not in inside}


def _paths(name: str, layer: nn.Module) -> list[str]:
    if not isinstance(layer, LowRankPair):
        return [name]
    return [path for path, _ in layer.named_modules(prefix=name)]


def _dead_channels(layer: nn.Module) -> int | None:
    if isinstance(layer, LowRankPair):
        layer = layer.second
    if not isinstance(layer, _ConvNd | nn.Linear):
        return None
    weight = layer.weight.detach()
    if isinstance(layer, _ConvTransposeNd):
        # (in, out / groups, ...), the groups side by side in `in`
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return int((weight.flatten(1) == 0).all(1).sum())


def _sizes(network: nn.Module) -> dict[str, int]:
    """Path of each module to the bytes of its own tensors in the file."""
    state = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    sizes: dict[str, int] = {}
    for key, size in stored_bytes(state).items():
        path = key.rpartition(".")[0]
        sizes[path] = sizes.get(path, 0) + size
    return sizes
