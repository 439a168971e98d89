"""A pair computes what its layer does, and looks like it from outside."""

import copy
import io

import pytest
import torch
from torch import nn

from slimnets.lowrank.decompose import as_matrix
from slimnets.lowrank.pair import LowRankPair, make_dense, make_pair

# torch's own, about even kernels
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "stride": (2, 3), "padding": (1, 0)},
    "padding": {"kernel_size": (3, 5), "padding": (2, 1), "bias": False},
    "same": {"kernel_size": (3, 4), "padding": "same", "dilation": (2, 1)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    "dilation": {"kernel_size": (2, 3), "dilation": (3, 2), "padding": 2},
    "row": {"kernel_size": (1, 3), "padding": (1, 1), "stride": (2, 1)},
    "column": {"kernel_size": (3, 1), "padding": (1, 1), "stride": (1, 2)},
    "pointwise": {"kernel_size": 1, "stride": 2},
    "pointwise padded": {"kernel_size": 1, "padding": 1, "padding_mode": "reflect"},
}
LAYERS = {
    "linear": lambda: nn.Linear(12, 7),
    "linear without bias": lambda: nn.Linear(5, 9, bias=False),
    "conv1d": lambda: nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2),
    "conv1d same": lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"),
    "conv1d pointwise": lambda: nn.Conv1d(4, 6, 1, bias=False),
} | {
    f"conv2d {name}": lambda arguments=arguments: nn.Conv2d(4, 6, **arguments)
    for name, arguments in CONVOLUTIONS.items()
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
every_split = pytest.mark.parametrize("decomposition", ["spatial", "channel"])


def inputs_of(layer):
    if isinstance(layer, nn.Linear):
        return torch.randn(3, 2, layer.in_features, dtype=layer.weight.dtype)
    size = (11, 9)[: layer.weight.ndim - 2]
    return torch.randn(2, layer.in_channels, *size, dtype=layer.weight.dtype)


def full_rank(layer, decomposition):
    return min(as_matrix(layer.weight, decomposition).shape)


@every_split
@every_layer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-5), (torch.float64, 1e-13)])
def test_at_full_rank_the_output_is_the_layers(make, decomposition, dtype, tolerance):
    layer = make().to(dtype)
    pair = make_pair(layer, full_rank(layer, decomposition), decomposition)
    inputs = inputs_of(layer)
    torch.testing.assert_close(pair(inputs), layer(inputs), rtol=0, atol=tolerance)
    torch.testing.assert_close(pair.weight, layer.weight, rtol=0, atol=tolerance)


@every_split
@every_layer
def test_at_a_lower_rank_the_weight_error_is_the_dropped_energy(make, decomposition):
    layer = make().double()
    s = torch.linalg.svdvals(as_matrix(layer.weight, decomposition))
    for rank in (1, 3):
        pair = make_pair(layer, rank, decomposition)
        error = (pair.weight - layer.weight).norm() ** 2
        torch.testing.assert_close(error, (s[rank:] ** 2).sum(), rtol=1e-9, atol=0)
        dense = make_dense(pair)
        inputs = inputs_of(layer)
        torch.testing.assert_close(pair(inputs), dense(inputs), rtol=0, atol=1e-12)


@every_split
@every_layer
def test_it_has_the_attributes_of_its_layer(make, decomposition):
    layer = make()
    pair = make_pair(layer, 2, decomposition)
    for name in (
        *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride"),
        *("dilation", "padding", "padding_mode", "groups"),
    ):
        assert getattr(pair, name, None) == getattr(layer, name, None), name
    assert pair.rank == 2
    assert pair.weight.shape == layer.weight.shape
    assert (pair.bias is None) == (layer.bias is None)
    assert str(make_dense(pair)) == str(layer)


@every_layer
def test_it_is_two_ordinary_layers(make):
    layer = make()
    pair = make_pair(layer, 2)
    kind = type(layer)
    assert [type(half) for half in pair] == [kind, kind]
    bias = ["second.bias"] if layer.bias is not None else []
    assert list(pair.state_dict()) == ["first.weight", "second.weight", *bias]


def test_a_slice_is_a_plain_sequential():
    pair = make_pair(nn.Linear(8, 4), 2)
    assert pair[0] is pair.first
    assert type(pair[:1]) is nn.Sequential
    assert list(pair[1:]) == [pair.second]


def test_the_bias_is_a_copy():
    layer = nn.Linear(4, 4)
    pair = make_pair(layer, 2)
    with torch.no_grad():
        pair.bias.zero_()
    assert layer.bias.any()


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_stays_frozen(frozen):
    layer = nn.Conv2d(4, 4, 3)
    getattr(layer, frozen).requires_grad_(False)
    pair = make_pair(layer, 2)
    for found in (pair, make_dense(pair)):
        assert found.bias.requires_grad == (frozen != "bias")
        assert found.weight.requires_grad == (frozen != "weight")
    assert pair.first.weight.requires_grad == pair.second.weight.requires_grad


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_training_flag_are_kept(training, dtype):
    layer = nn.Conv2d(4, 4, 3).to(dtype).train(training)
    pair = make_pair(layer, 2)
    for found in (pair, *pair, make_dense(pair)):
        assert found.training == training
        assert {p.dtype for p in found.parameters()} == {dtype}


def test_forward_and_backward_hooks_go_on_working():
    layer, calls = nn.Linear(4, 4), []
    handle = layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    pair = make_pair(layer, 2)
    pair(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]
    handle.remove()
    pair(torch.randn(3, 4))
    assert calls == ["forward", "backward"]


def test_the_product_is_differentiable():
    pair = make_pair(nn.Conv2d(4, 4, 3), 2)
    pair.weight.square().sum().backward()
    assert all(half.weight.grad.any() for half in pair)


def test_half_precision_is_merged_in_float32():
    pair = make_pair(nn.Linear(64, 64), 16).half()
    exact = pair.second.weight.float() @ pair.first.weight.float()
    assert torch.equal(make_dense(pair).weight, exact.half())


def test_no_random_number_is_drawn():
    layer = nn.Conv2d(4, 4, 3)
    before = torch.get_rng_state()
    make_dense(make_pair(layer, 2))
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_copied_and_pickled():
    pair = make_pair(nn.Conv2d(4, 4, 3), 2)
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    inputs = torch.randn(1, 4, 5, 5)
    for again in (copy.deepcopy(pair), torch.load(file, weights_only=False)):
        assert isinstance(again, LowRankPair)
        assert torch.equal(again(inputs), pair(inputs))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # torch itself advises
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3)], ids=["linear", "conv"])
def test_it_is_exported_and_scripted(layer):
    pair = make_pair(layer, 2).eval()
    inputs = inputs_of(layer)
    expected = pair(inputs)
    assert torch.equal(torch.export.export(pair, (inputs,)).module()(inputs), expected)
    assert torch.equal(torch.jit.script(pair)(inputs), expected)
