"""What becomes of each layer: which rank it gets, or why it is left as it is."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias, cast

from rich.table import Table
from torch import Tensor, nn

from slimnets.arguments import check_number
from slimnets.layers import compressed_network
from slimnets.lowrank.budget import least_weights, ranks_for_budget
from slimnets.lowrank.decompose import (
    Decomposition,
    as_matrix,
    energies,
    matrix_shape,
    matrix_shape_of_pair,
    rank_for_energy,
    rank_for_fraction,
)
from slimnets.lowrank.modules import LowRankPair, replaceable, weights_of
from slimnets.lowrank.reasons import reasons_to_leave
from slimnets.selectors import Selector, Selectors, as_selectors, assign, without
from slimnets.text import as_text

Rank: TypeAlias = int | float
"""A rank, or a fraction of the layer's full rank in (0, 1)."""


@dataclass(frozen=True)
class Row:
    """What becomes of one layer.

    Attributes:
        name: Its name in the compressed network.
        kind: Its type.
        rank: The rank of the pair that takes its place; None if it is left as it is.
        before: Number of weights, biases not counted.
        after: The same afterwards.
        reason: Why it is left; empty if it is not.
        asked: Whether it is left because the arguments say so.
        unmet: The rank asked for, of a pair that is there already and has another.
    """

    name: str
    kind: str
    rank: int | None
    before: int
    after: int
    reason: str = ""
    asked: bool = False
    unmet: int | None = None


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer; prints as a table.

    Attributes:
        rows: One for each layer that could be meant, in the order of ``named_modules()``.
    """

    rows: tuple[Row, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Name of each layer that is to be replaced, and its rank."""
        return {row.name: row.rank for row in self.rows if row.rank is not None}

    @property
    def left(self) -> tuple[Row, ...]:
        """The layers that are left although the arguments do not say so."""
        return tuple(row for row in self.rows if row.rank is None and not row.asked)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __rich__(self) -> Table:
        table = Table("layer", "type")
        for column in ("rank", "weights", "after"):
            table.add_column(column, justify="right")
        table.add_column("left because")
        for row in self.rows:
            rank = "" if row.rank is None else str(row.rank)
            table.add_row(row.name, row.kind, rank, f"{row.before:,}", f"{row.after:,}", row.reason)
        return table

    def __str__(self) -> str:
        return as_text(self, width=120).rstrip()


def plan(
    model: nn.Module,
    r: Rank | Mapping[str, Rank] | None = None,
    *,
    energy: float | None = None,
    budget: float | None = None,
    decomposition: Decomposition = "spatial",
    exclude: Selectors = (),
) -> Plan:
    """What :func:`slimnets.factorize` would do with the same arguments; changes nothing.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If one is out of range, a glob matches nothing, a weight is not finite, or the
            budget is too small for any pairs.

    Examples:
        >>> rows = plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)), r=8).rows
        >>> [(row.name, row.rank, row.after, row.reason) for row in rows]
        [('0', 8, 1024, ''), ('1', None, 256, 'rank 8 is not below its full rank of 4')]
    """
    selectors = check_arguments(r, energy, budget, decomposition, exclude)
    network = compressed_network(model)
    layers = named_layers(network)
    chosen = without(network, layers, selectors)
    wanted = assign(r, layers, "r", network)
    asked = {
        name: "excluded" if name not in chosen else "" if name in wanted else "not in r"
        for name in layers
    }
    reasons = {
        name: asked[name] or reason for name, reason in reasons_to_leave(model, layers).items()
    }
    weights = _finite({name: layer for name, layer in layers.items() if not reasons[name]})
    if r is None:
        zero = "it is all zero, without energy to keep a share of: give r"
        reasons |= {name: zero for name, weight in weights.items() if not weight.any()}
        weights = {name: weight for name, weight in weights.items() if not reasons[name]}
    sides = {name: matrix_shape(weight.shape, decomposition) for name, weight in weights.items()}
    pairs = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, LowRankPair) and not asked[name]
    }
    unmet: dict[str, int] = {}
    if energy is not None:
        ranks = {
            name: rank_for_energy(as_matrix(weight, decomposition), energy)
            for name, weight in weights.items()
        }
    elif budget is not None:
        ranks = _ranks_within(budget, weights, sides, pairs, decomposition)
        spent = "the pairs that are there have used up the budget: slimnets.merge makes them dense"
        reasons |= {name: spent for name in weights if name not in ranks}
    else:
        ranks = {name: _resolve(wanted[name], min(both)) for name, both in sides.items()}
        for name, pair in pairs.items():
            meant = _resolve(wanted[name], min(_sides(pair)))
            if meant != pair.rank:
                unmet[name] = meant
                reasons[name] += f", not {meant}: slimnets.merge makes it dense again"
    reasons |= {name: _reason_of_size(rank, *sides[name]) for name, rank in ranks.items()}
    rows = []
    for name, layer in layers.items():
        rank = None if reasons[name] else ranks[name]
        before = _count(layer)
        after = before if rank is None else rank * sum(sides[name])
        why = (reasons[name], bool(asked[name]), unmet.get(name))
        rows.append(Row(name, type(layer).__name__, rank, before, after, *why))
    return Plan(tuple(rows))


def check_arguments(
    r: Rank | Mapping[str, Rank] | None,
    energy: float | None,
    budget: float | None,
    decomposition: str,
    exclude: Selectors,
) -> tuple[Selector, ...]:
    """Raise unless the arguments of :func:`slimnets.factorize` make sense; return ``exclude``."""
    if [r, energy, budget].count(None) != 2:
        raise ValueError(f"r={r!r}, energy={energy!r}, budget={budget!r}: give exactly one of them")
    if decomposition not in ("spatial", "channel"):
        raise ValueError(f"decomposition={decomposition!r}: expected 'spatial' or 'channel'")
    if isinstance(r, Mapping):
        if not r:
            raise ValueError("r={}: expected globs over layer names and their ranks")
        for glob, rank in r.items():
            if not isinstance(glob, str):
                raise TypeError(f"r={r!r}: expected globs over layer names, not {glob!r}")
            _check_rank(rank, f"r[{glob!r}]")
    elif r is not None:
        _check_rank(r, "r")
    if energy is not None:
        _check_share("energy", energy, "a share of the squared singular values in (0, 1)")
    if budget is not None:
        _check_share("budget", budget, "a share of the layers' weights in (0, 1)")
    return as_selectors(exclude)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers a user may have in mind: what can be factorized, and what is named as left."""
    return replaceable(model, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def _finite(layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of layers.

    Raises:
        ValueError: If one has values that are not finite.
    """
    weights = {name: cast(Tensor, layer.weight).detach() for name, layer in layers.items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(
                f"the weight of layer {name!r} has infinite or NaN values; repair it, or exclude "
                "the layer"
            )
    return weights


def _ranks_within(
    budget: float,
    weights: Mapping[str, Tensor],
    sides: Mapping[str, tuple[int, int]],
    pairs: Mapping[str, LowRankPair],
    decomposition: Decomposition,
) -> dict[str, int]:
    """The ranks of layers with which they and ``pairs`` have that share of their dense weights.

    Empty if they have more with the least ranks, since the pairs were made with another budget.

    Raises:
        ValueError: If there are no pairs, and they have more.
    """
    dense = sum(math.prod(both) for both in [*sides.values(), *map(_sides, pairs.values())])
    there, least = sum(map(_count, pairs.values())), least_weights(sides)
    if there + least > budget * dense:
        if pairs:
            return {}
        raise ValueError(
            f"budget={budget!r}: even with pairs of rank 1 there are {least / dense:.2g} of "
            f"{dense:,} weights; give more, or exclude small layers"
        )
    shares = {name: energies(as_matrix(weight, decomposition)) for name, weight in weights.items()}
    return ranks_for_budget(shares, sides, int(budget * dense) - there)


def _sides(pair: LowRankPair) -> tuple[int, int]:
    return matrix_shape_of_pair(pair.first.weight.shape, pair.second.weight.shape)


def _resolve(r: Rank | None, full_rank: int) -> int:
    return int(r) if isinstance(r, Integral) else rank_for_fraction(cast(float, r), full_rank)


def _reason_of_size(rank: int, rows: int, columns: int) -> str:
    full, weights = min(rows, columns), rank * (rows + columns)
    if rank >= full:
        return f"rank {rank} is not below its full rank of {full}"
    if weights >= rows * columns:
        return f"a pair of rank {rank} would not be smaller: {weights:,} weights"
    return ""


def _count(layer: nn.Module) -> int:
    return sum(weight.numel() for weight in weights_of(layer))


def _check_rank(rank: object, argument: str) -> None:
    expected = "a rank of at least 1, or a fraction of the layer's full rank in (0, 1)"
    is_rank = isinstance(rank, Integral)

    def hint(number: float) -> str:
        return f"; did you mean {round(number)}?" if 1 < number < 1e6 else ""

    check_number(argument, rank, expected, lambda x: x >= 1 if is_rank else 0 < x < 1, hint)


def _check_share(argument: str, share: object, expected: str) -> None:
    def hint(number: float) -> str:
        return f"; did you mean {number / 100}?" if 1 < number < 100 else ""

    check_number(argument, share, expected, lambda x: 0 < x < 1, hint)
