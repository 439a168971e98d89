"""Structure from the keys and shapes of a state dict."""

import copy

import pytest
import torch
from torch import nn

from slimnets.lowrank.factorize import factorize
from slimnets.lowrank.modules import LowRankPair, refusal, replaceable, restructure


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(8, 8, 3, dilation=2),
        nn.Linear(16, 12),
        nn.BatchNorm1d(12),
    )


def shapes_of(net, prefix=""):
    return {prefix + key: tensor.shape for key, tensor in net.state_dict().items()}


def assert_follows(net, other):
    """``net`` takes on the structure of ``other``, loads its state, and is the same then."""
    net = restructure(net, shapes_of(other))
    net.load_state_dict(other.state_dict())
    assert str(net) == str(other)
    return net


@pytest.mark.parametrize("decomposition", ["spatial", "channel"])
def test_dense_layers_become_the_pairs_found(decomposition):
    pairs = factorize(network(), {"0": 5, "*": 2}, decomposition=decomposition)
    found = assert_follows(network(), pairs)
    images = torch.randn(2, 3, 9, 9)
    assert torch.equal(found[0](images), pairs[0](images))


def test_pairs_take_on_the_rank_found():
    assert_follows(factorize(network(), {"0": 2, "3": 4}), factorize(network(), {"0": 3, "2": 1}))


def test_pairs_take_on_the_split_found():
    assert_follows(factorize(network(), 2), factorize(network(), 2, decomposition="channel"))


def test_pairs_become_dense_again():
    found = assert_follows(factorize(network(), 2), network())
    assert not any(isinstance(m, LowRankPair) for m in found.modules())


def test_what_is_right_already_is_left_alone():
    net = factorize(network(), {"0": 2})
    before = list(net.modules())
    assert restructure(net, shapes_of(net)) is net
    assert list(net.modules()) == before


def test_layers_without_a_key_are_left_alone():
    net = network()
    before = list(net.modules())
    restructure(net, {})
    restructure(net, {"elsewhere.first.weight": torch.Size((2, 2))})
    assert list(net.modules()) == before


def test_keys_may_have_a_prefix():
    pairs = factorize(network(), 2)
    found = restructure(network(), shapes_of(pairs, "student.net."), "student.net.")
    assert str(found) == str(pairs)


def test_a_root_that_is_a_layer_is_replaced():
    found = restructure(nn.Linear(8, 8), shapes_of(factorize(nn.Linear(8, 8), 2), "x."), "x.")
    assert isinstance(found, LowRankPair)
    assert isinstance(restructure(found, shapes_of(nn.Linear(8, 8))), nn.Linear)


def test_a_layer_that_stands_twice_is_replaced_twice():
    layer = nn.Linear(8, 8)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    found = restructure(net, shapes_of(factorize(copy.deepcopy(net), 2)))
    assert isinstance(found[0], LowRankPair)
    assert found[0] is found[2]


def test_dtype_requires_grad_and_training_are_kept():
    net = network().to(torch.bfloat16).eval()
    net[3].requires_grad_(False)
    restructure(net, shapes_of(factorize(network(), 2)))
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in net.modules())
    assert [p.requires_grad for p in net[3].parameters()] == [False] * 3
    assert all(p.requires_grad for p in net[0].parameters())


def test_a_layer_on_the_meta_device_stays_there():
    net = restructure(nn.Linear(8, 8, device="meta"), shapes_of(factorize(nn.Linear(8, 8), 2)))
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert restructure(net, shapes_of(nn.Linear(8, 8))).weight.is_meta


WRONG = {
    "inputs": {"0.first.weight": (2, 4, 3, 1)},
    "outputs": {"0.second.weight": (9, 2, 1, 3)},
    "rank": {"0.first.weight": (3, 3, 3, 1)},
    "rank above the full": {"3.first.weight": (13, 16), "3.second.weight": (12, 13)},
    "rank zero": {"3.first.weight": (0, 16), "3.second.weight": (12, 0)},
    "kernel": {"0.first.weight": (2, 3, 3, 3)},
    "dimensions": {"3.first.weight": (2, 16, 1)},
    "no dimensions": {"3.first.weight": ()},
    "bias": {"3.second.bias": (13,)},
    "no bias": {"3.second.bias": None},
    "no second": {"3.second.weight": None},
    "no first": {"3.first.weight": None},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_shapes_that_cannot_be_are_refused_and_nothing_is_changed(wrong):
    shapes = shapes_of(factorize(network(), 2))
    for key, shape in wrong.items():
        if shape is None:
            del shapes[key]
        else:
            shapes[key] = torch.Size(shape)
    key = next(iter(wrong))
    for net in (network(), factorize(network(), 1)):
        before = list(net.modules())
        with pytest.raises(ValueError, match=rf"{key[0]}\.(first|second)"):
            restructure(net, shapes)
        assert list(net.modules()) == before


def test_a_dense_shape_that_cannot_be_is_refused():
    net = factorize(network(), 2)
    shapes = shapes_of(network()) | {"3.weight": torch.Size((12, 17))}
    with pytest.raises(ValueError, match=r"3\.weight: expected \(12, 16\), found \(12, 17\)"):
        restructure(net, shapes)
    assert isinstance(net[0], LowRankPair)


def test_a_huge_rank_is_refused_before_memory_is_asked_for():
    shapes = {"first.weight": torch.Size((10**12, 8)), "second.weight": torch.Size((8, 10**12))}
    with pytest.raises(ValueError, match=r"first\.weight: \(1000000000000, 8\)"):
        restructure(nn.Linear(8, 8, bias=False), shapes)


class Scaled(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


class Renamed(nn.Linear):
    """Computes what nn.Linear does."""


def tiling():
    layer = nn.Conv2d(4, 4, 3)
    layer._conv_forward = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")._conv_forward
    return layer


def patched():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


REFUSED = {
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d is not supported"),
    "3d": (lambda: nn.Conv3d(4, 4, 3), "Conv3d is not supported"),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), r"grouped \(groups=2\)"),
    "lazy": (lambda: nn.LazyLinear(4), "no values yet"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "computed from other parameters",
    ),
    "pruned by torch": (
        lambda: nn.utils.prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5),
        "computed from other parameters",
    ),
    "own convolution": (lambda: Scaled(4, 4, 3), "Scaled has a forward pass of its own"),
    "patched convolution": (tiling, "Conv2d has a forward pass of its own"),
    "own forward": (patched, "Linear has a forward pass of its own"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "complex64"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_pair_can_stand_for_is_named(make, reason):
    layer = make()
    assert layer in dict(replaceable(layer)).values()
    shapes = {"first.weight": torch.Size((2, 4)), "second.weight": torch.Size((4, 2))}
    with pytest.raises(ValueError, match=rf"first\.weight: no pair .*{reason}"):
        restructure(layer, shapes)


def test_a_subclass_that_computes_the_same_is_not_refused():
    assert refusal(Renamed(4, 4)) == ""
