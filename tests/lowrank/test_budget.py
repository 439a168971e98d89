"""LowRank's and factorize's budget=: ranks chosen for all layers together."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from slimnets import LowRank, factorize, load, merge, save
from slimnets.lowrank import plan
from slimnets.lowrank.budget import ranks_for_budget
from slimnets.lowrank.decompose import energies
from tests.support import Classifier, ranks, small_data


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def decaying(rows, columns, decay):
    """A layer whose squared singular values fall by ``decay`` from one to the next."""
    layer = nn.Linear(columns, rows, bias=False)
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    layer.weight.data = u * decay ** (torch.arange(len(s)) / 2) @ vh
    return layer


def kept(shares, ranks):
    return math.prod(float(one[:rank].sum()) for one, rank in zip(shares, ranks, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_no_ranks_with_as_many_weights_keep_more(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (6, 9), "b": (7, 5), "c": (12, 6)}
    shares = {
        name: energies(torch.randn(shape, generator=generator) ** 3)
        for name, shape in shapes.items()
    }

    def weights(ranks):
        both = zip(shapes.values(), ranks, strict=True)
        return sum(min(rank * sum(shape), math.prod(shape)) for shape, rank in both)

    def are_pairs(ranks):
        both = zip(shapes.values(), ranks, strict=True)
        return all(rank * sum(shape) < math.prod(shape) for shape, rank in both)

    candidates = itertools.product(*(range(1, min(shape) + 1) for shape in shapes.values()))
    candidates = [one for one in candidates if are_pairs(one)]
    for budget in range(weights((1, 1, 1)), sum(map(math.prod, shapes.values())), 7):
        found = tuple(ranks_for_budget(shares, shapes, budget).values())
        spent = weights(found)
        # the last bit of a budget may be too little for the rank whose turn it is
        assert budget - max(map(sum, shapes.values())) < spent <= budget
        if are_pairs(found):
            best = max(kept(shares.values(), one) for one in candidates if weights(one) <= spent)
            assert kept(shares.values(), found) == pytest.approx(best)


@pytest.mark.parametrize("decomposition", ["spatial", "channel"])
@pytest.mark.parametrize("budget", [0.1, 0.25, 0.6])
def test_the_layers_have_together_the_share_of_their_weights(budget, decomposition):
    net = network()
    dense = sum(one.weight.numel() for one in net if hasattr(one, "weight"))
    found = plan(net, budget=budget, decomposition=decomposition)
    assert budget * dense - 300 < sum(row.after for row in found) <= budget * dense
    factorize(net, budget=budget, decomposition=decomposition)
    weights = sum(one.numel() for name, one in net.named_parameters() if "bias" not in name)
    assert weights == sum(row.after for row in found)


def test_what_it_keeps_is_nearer_to_the_network_than_equal_fractions_do():
    net = nn.Sequential(decaying(64, 64, 0.5), nn.ReLU(), decaying(64, 64, 0.97))
    inputs = torch.randn(256, 64)
    wanted = net(inputs)
    fraction, budget = (plan(net, **how) for how in ({"r": 0.25}, {"budget": 0.5}))
    assert sum(row.after for row in budget) <= sum(row.after for row in fraction)
    errors = []
    for chosen in (fraction.ranks, budget.ranks):
        outputs = factorize(copy.deepcopy(net), chosen)(inputs)
        errors.append((outputs - wanted).norm() / wanted.norm())
    assert errors[1] < 0.9 * errors[0]


def test_scales_of_layers_make_no_difference():
    net = network()
    before = plan(net, budget=0.3).ranks
    net[2].weight.data *= 1000
    net[6].weight.data *= 0.001
    assert plan(net, budget=0.3).ranks == before


def test_layers_that_differ_in_nothing_get_the_same():
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    for layer in net:
        nn.init.orthogonal_(layer.weight)  # each direction as good as any
    assert set(plan(net, budget=0.5).ranks.values()) <= {15, 16, 17}


def test_a_second_time_it_changes_nothing():
    net = nn.Sequential(decaying(32, 32, 0.5), nn.ReLU(), decaying(32, 32, 0.999), nn.Linear(32, 4))
    first = plan(net, budget=0.7)
    assert first.ranks and any(row.rank is None for row in first)
    layers = dict(factorize(net, budget=0.7).named_modules())
    second = factorize(net, budget=0.7)
    assert dict(second.named_modules()) == layers


def test_a_layer_beside_pairs_that_have_used_up_the_budget_is_left():
    net = factorize(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), budget=0.25)
    net.append(nn.Linear(64, 16))
    assert plan(net, budget=0.3).ranks == {"2": 6}  # of 80 weights each
    found = plan(net, budget=0.1)
    assert not found.ranks
    assert found.rows[1].reason.startswith("the pairs that are there have used up the budget")
    assert isinstance(factorize(net, budget=0.1)[2], nn.Linear)


def test_excluded_layers_are_not_counted():
    net = network()
    found = plan(net, budget=0.2, exclude="2")
    counted = [row for row in found if row.name != "2"]
    assert sum(row.after for row in counted) <= 0.2 * sum(row.before for row in counted)


def test_no_rank_is_spent_on_what_a_layer_does_not_have():
    net = nn.Sequential(decaying(64, 64, 0.9), decaying(64, 64, 0.9))
    merge(factorize(net, r={"0": 4, "1": 6}))
    assert plan(net, budget=0.9).ranks == {"0": 4, "1": 6}


def test_a_layer_of_zeros_is_left():
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.init.zeros_(net[1].weight)
    found = plan(net, budget=0.4)
    assert found.rows[1].reason.startswith("it is all zero")
    assert found.rows[0].after <= 0.4 * 32 * 32
    nn.init.zeros_(net[0].weight)
    assert not plan(net, budget=0.4).ranks


def test_a_budget_below_the_least_is_refused_before_any_change():
    net = network()
    layers = list(net.modules())
    with pytest.raises(
        ValueError, match=r"budget=0\.001: even with pairs of rank 1 there are 0\.0"
    ):
        factorize(net, budget=0.001)
    assert list(net.modules()) == layers


def test_on_a_trainer_and_from_a_file(make_trainer, tmp_path):
    module = Classifier()
    wanted = plan(module, budget=0.4).ranks
    make_trainer(callbacks=[LowRank(budget=0.4)], max_epochs=1).fit(
        module, small_data(), small_data(8)
    )
    assert ranks(module) == wanted
    save(module, tmp_path / "x.safetensors")
    assert ranks(load(tmp_path / "x.safetensors", Classifier())) == wanted
