"""Passes take turns, and leave nothing behind."""

import itertools
import random
import time

import numpy as np
import pytest
import torch
from torch import nn

from slimnets.inspection.latency import Spread, measure, undisturbed

CPU = torch.device("cpu")


def test_passes_take_turns() -> None:
    calls: list[str] = []
    times = measure(
        lambda: calls.append("a"), lambda: calls.append("b"), devices=[CPU], seconds=0.01
    )
    assert len(times[0]) == len(times[1]) >= 10
    timed = calls[6:]  # after three passes of each to warm up
    assert timed == list(itertools.islice(itertools.cycle("ab"), len(timed)))


def test_a_slow_pass_is_seen_and_ends_the_measurement_soon() -> None:
    times = measure(lambda: time.sleep(0.02), lambda: None, devices=[CPU], seconds=0.0)
    assert len(times[0]) == 10
    assert min(times[0]) >= 0.02
    assert Spread.of(times[0]).median > Spread.of(times[1]).median


def test_spread() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_random_states_come_back(fails: bool) -> None:
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3))
    network[0].eval()
    state = torch.get_rng_state()
    states = random.getstate(), np.random.get_state()[2]
    try:
        with undisturbed(network):
            assert not any(module.training for module in network.modules())
            torch.rand(5), random.random(), np.random.rand()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [module.training for module in network.modules()] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.getstate(), np.random.get_state()[2]) == states
