"""Factorized layers, accelerated."""

import torch
from torch import nn

from slimnets.acceleration.pairs import pairs_or_products
from slimnets.lowrank.factorize import factorize
from slimnets.lowrank.modules import LowRankPair, pairs_of
from tests.acceleration.networks import assert_right, computed_by


def factorized() -> nn.Module:
    layers = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 64, 64))
    return factorize(nn.Sequential(*layers).eval(), {"0": 4, "3": 8})


def test_a_pair_computes_the_same_pruned_or_not():
    network, x = factorized(), torch.randn(2, 16, 8, 8)
    for density in (1.0, 0.1):
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(torch.rand_like(parameter) < density)
        fast = computed_by("engine", network, x)
        assert_right(network, fast, x)
        names = {row.name for row in fast.report.rows}
        for layer in ("0", "3"):  # as a pair, or multiplied out
            assert names & {layer, f"{layer}.first"} and not {layer, f"{layer}.first"} <= names


def test_only_what_is_faster_is_multiplied_out():
    network, x = factorized(), torch.randn(2, 16, 8, 8)

    def times(of: nn.Module) -> dict[str, float]:
        pairs = {"0.first": 1.0, "0.second": 1.0, "3.first": 1.0, "3.second": 1.0}
        return pairs if pairs_of(of) else {"0": 1.5, "3": 2.5}

    with torch.no_grad():
        expected = network(x)
        chosen = pairs_or_products(network, times)
        torch.testing.assert_close(chosen(x), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(chosen[0], nn.Conv2d) and isinstance(chosen[3], LowRankPair)
