import copy

import pytest
import torch
from torch import nn

from slimnets import GradualPrune, prune
from slimnets.pruning import lamp, magnitude
from slimnets.pruning.masks import lowest
from tests.support import Classifier, small_data, small_network


def by_sorting(weights):
    """The definition of the paper, for weights that are all different."""
    squares, order = weights.double().flatten().square().sort(descending=True)
    scores = torch.empty_like(squares)
    scores[order] = squares / squares.cumsum(0)
    return scores.view(weights.shape)


@pytest.mark.parametrize("shape", [(7,), (300, 200), (16, 8, 3, 3)])
def test_lamp_is_the_papers(shape):
    torch.manual_seed(0)
    weights = torch.randn(shape)
    found, wanted = lamp(nn.Parameter(weights)), by_sorting(weights)
    assert found.shape == weights.shape
    # weights that are within a 2,000th of each other are counted together
    torch.testing.assert_close(found.double(), wanted, rtol=0.1, atol=0)
    assert (found.double() / wanted - 1).abs().median() < 0.002


def test_lamp_prunes_a_layer_in_the_order_of_the_magnitude():
    weights = nn.Parameter(torch.randn(64, 64))
    for k in (1, 1000, 4000):
        (by_lamp,), _ = lowest([lamp(weights)], k)
        (by_magnitude,), _ = lowest([magnitude(weights)], k)
        assert torch.equal(by_lamp, by_magnitude)


def test_lamp_gives_equal_weights_equal_scores():
    scores = lamp(nn.Parameter(torch.tensor([1.0, -1.0, 2.0, 2.0, 0.0, -0.0])))
    torch.testing.assert_close(scores, torch.tensor([0.1, 0.1, 0.5, 0.5, 0, 0]))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_lamp_does_not_see_the_scale(scale):
    weights = torch.randn(32, 32)
    found = lamp(nn.Parameter(weights * scale))
    torch.testing.assert_close(found, lamp(nn.Parameter(weights)), rtol=0.1, atol=0)


def test_lamp_of_zeros_and_of_what_is_not_finite():
    assert not lamp(nn.Parameter(torch.zeros(4))).any()
    infinite, nan, one, zero = lamp(nn.Parameter(torch.tensor([torch.inf, torch.nan, 1.0, 0.0])))
    assert infinite == torch.inf and nan.isnan() and 0 < one <= 1 and zero == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_lamp_takes_every_precision(dtype):
    weights = torch.randn(16, 16).to(dtype)
    torch.testing.assert_close(lamp(nn.Parameter(weights)), lamp(nn.Parameter(weights.float())))


def test_globally_lamp_empties_no_layer_where_the_magnitude_does():
    net = small_network()
    net[3].weight.data *= 1e-3
    emptied = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="nothing of '3.weight'"):
        prune(emptied, 0.9, scope="global")
    assert not emptied[3].weight.any()
    masks = prune(net, 0.99, scope="global", criterion=lamp)
    assert all(mask.any() for mask in masks.values())
    weights = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(0.99 * weights)


def test_lamp_on_a_trainer(make_trainer):
    module = Classifier()
    callback = GradualPrune(0.9, criterion=lamp, scope="global")
    make_trainer(max_epochs=4, callbacks=[callback]).fit(module, small_data(), small_data(8))
    layers = [one for one in module.network if isinstance(one, nn.Linear | nn.Conv2d)]
    zeros = [int((one.weight == 0).sum()) for one in layers]
    weights = [one.weight.numel() for one in layers]
    assert sum(zeros) == round(0.9 * sum(weights))
    shares = [z / n for z, n in zip(zeros, weights, strict=True)]
    assert min(shares) < 0.7 < 0.9 < max(shares)  # the small layers keep more of theirs
