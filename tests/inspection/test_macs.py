"""Operations are counted where they are executed, and belong to the layer that owns the weight."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

from slimnets.inspection.macs import Macs, count_macs


def count(network: nn.Module, *inputs: Any, **named: Any) -> dict[str, tuple[int, int]]:
    network.eval()
    found = count_macs(network, lambda: network(*inputs, **named))
    return {name: (macs.dense, macs.effective) for name, macs in found.items()}


def half_zero(*weights: Tensor) -> None:
    for weight in weights:
        weight.data.flatten()[::2] = 0


x = torch.randn

LAYERS = [
    # layer, input, multiplications: outputs times inputs that each of them sums over
    (nn.Linear(6, 4), x(3, 6), 3 * 4 * 6),
    (nn.Linear(6, 4, bias=False), x(3, 5, 6), 15 * 4 * 6),
    (nn.Linear(6, 4), x(6), 4 * 6),
    (nn.Conv1d(4, 6, 3), x(2, 4, 10), 2 * 6 * 8 * 4 * 3),
    (nn.Conv2d(4, 6, 3, padding="same"), x(2, 4, 8, 8), 2 * 6 * 64 * 4 * 9),
    (nn.Conv2d(4, 6, 3, stride=2, dilation=2), x(2, 4, 9, 9), 2 * 6 * 9 * 4 * 9),
    (nn.Conv2d(4, 8, 3, groups=4, padding=1), x(2, 4, 8, 8), 2 * 8 * 64 * 9),
    (nn.Conv2d(4, 6, 1), x(4, 8, 8), 6 * 64 * 4),
    (nn.Conv3d(2, 4, 3), x(2, 2, 4, 4, 4), 2 * 4 * 8 * 2 * 27),
    (nn.ConvTranspose2d(4, 6, 3, stride=2), x(2, 4, 5, 5), 2 * 25 * 4 * 6 * 9),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), x(2, 4, 5, 5), 2 * 25 * 4 * 3 * 9),
]


@pytest.mark.parametrize(("layer", "images", "expected"), LAYERS)
def test_one_layer(layer: nn.Module, images: Tensor, expected: int) -> None:
    half_zero(layer.weight)
    assert count(layer, images) == {"": (expected, expected // 2)}


class Called(nn.Module):
    """A function with a weight beside its other arguments."""

    def __init__(self, function: Callable[..., Tensor], weight: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs, self.weight)


def scaled(one: Tensor, weight: Tensor) -> Tensor:
    by = torch.ones(())
    return torch._scaled_mm(one.to(weight.dtype), weight.t(), by, by, out_dtype=torch.bfloat16)


FUNCTIONS = [
    (torch.addbmm, (x(4, 6), x(3, 4, 5)), x(3, 5, 6), 3 * 4 * 5 * 6),
    pytest.param(
        *(scaled, (x(16, 32),), torch.ones(48, 32).to(torch.float8_e4m3fn), 16 * 32 * 48),
        marks=pytest.mark.skipif(
            not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm", "CPU"),
            reason="this torch multiplies float8 on GPUs only",
        ),
    ),
    (torch._int_mm, (x(32, 16).to(torch.int8),), torch.ones(16, 8).to(torch.int8), 32 * 16 * 8),
]


@pytest.mark.parametrize(("function", "inputs", "weight", "expected"), FUNCTIONS)
def test_one_function(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], weight: Tensor, expected: int
) -> None:
    network = Called(function, weight)
    half_zero(network.weight)
    assert count(network, *inputs) == {"": (expected, expected // 2)}


@pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "supports_higher_order_operators"),
    reason="modes of this torch do not see operators of higher order",
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_of_a_higher_order_operator() -> None:
    queries = x(1, 2, 128, 16)
    found = count_macs(nn.Module(), lambda: flex_attention(queries, queries, queries))
    assert found == {"": Macs(2 * 2 * 128 * 128 * 16, 2 * 2 * 128 * 128 * 16)}


def test_an_operator_of_another_library_counts_by_its_formula() -> None:
    @torch.library.custom_op("slimnets_tests::product", mutates_args=())
    def product(one: Tensor, other: Tensor) -> Tensor:
        return one @ other

    operator = torch.ops.slimnets_tests.product
    network = Called(product, x(4, 5))
    assert count(network, x(3, 4)) == {}
    register_flop_formula(operator)(lambda one, other, **_: 2 * one[0] * one[1] * other[1])
    try:
        assert count(network, x(3, 4)) == {"": (60, 60)}
    finally:
        del flop_registry[operator]


def test_a_product_of_two_vectors() -> None:
    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, features: Tensor) -> Tensor:
            return torch.dot(features, self.weight)

    network = Score()
    half_zero(network.weight)
    assert count(network, x(6)) == {"": (6, 3)}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase], bidirectional: bool) -> None:
    layer = kind(6, 4, num_layers=2, batch_first=True, bidirectional=bidirectional)
    weights = [parameter for name, parameter in layer.named_parameters() if "weight" in name]
    half_zero(*weights)
    steps = 3 * 5
    expected = steps * sum(weight.numel() for weight in weights)
    assert count(layer, x(3, 5, 6)) == {"": (expected, expected // 2)}


def test_a_bilinear_layer_multiplies_by_every_weight() -> None:
    layer = nn.Bilinear(3, 4, 5)
    found = count_macs(layer, lambda: layer(torch.ones(2, 3), torch.ones(2, 4)))
    assert found[""].dense == 2 * 3 * 4 * 5


def test_attention_counts_its_scores_too() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    half_zero(layer.in_proj_weight)
    tokens = x(3, 5, 8)
    projections, scores = 15 * 8 * 24, 3 * 5 * 5 * 8 * 2
    assert count(layer, query=tokens, key=tokens, value=tokens, need_weights=False) == {
        "": (projections + scores, projections // 2 + scores),
        "out_proj": (15 * 64, 15 * 64),
    }


def test_the_fast_path_of_a_transformer_hides_nothing() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    tokens = x(3, 5, 8)
    found = count(encoder, tokens)
    assert found["linear1"] == found["linear2"] == (15 * 8 * 16, 15 * 8 * 16)
    assert set(found) == {"self_attn", "self_attn.out_proj", "linear1", "linear2"}
    assert torch.backends.mha.get_fastpath_enabled()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layer(self.layer(self.embedding(tokens)))
        return self.head(hidden)


def test_a_shared_layer_counts_each_call_and_a_tied_one_what_it_does_itself() -> None:
    found = count(Shared(), torch.arange(3)[None])
    assert found == {"layer": (2 * 3 * 16, 2 * 3 * 16), "head": (3 * 28, 3 * 28)}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.layer.weight[:2]).T @ inputs


def test_a_weight_used_in_a_function_belongs_to_its_layer() -> None:
    network = Functional()
    network.layer.weight.data[0] = 0
    # half of the slice is zero; the product of two activations is the network's own
    assert count(network, x(3, 4)) == {"layer": (3 * 2 * 4, 3 * 4), "": (2 * 3 * 4, 2 * 3 * 4)}


def test_a_computed_weight_belongs_to_the_layer_that_runs() -> None:
    network = nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.ReLU())
    assert count(network, x(2, 4)) == {"0": (24, 24)}


def test_a_compiled_layer_is_counted_and_stays_compiled() -> None:
    network = nn.Sequential(nn.Linear(4, 3))
    network[0].compile(backend="eager")
    assert count(network, x(2, 4)) == {"0": (24, 24)}


def test_nothing_of_the_counting_stays_behind() -> None:
    network = nn.Linear(4, 3)

    def forward() -> None:
        raise RuntimeError("no such input")

    with pytest.raises(RuntimeError, match="no such input"):
        count_macs(network, forward)
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
    assert torch.backends.mha.get_fastpath_enabled()
    assert count_macs(network, lambda: None) == {}
    assert count_macs(network, lambda: network(x(1, 4))) == {"": Macs(12, 12)}


def test_a_layer_that_fails_and_is_passed_over_owns_nothing_that_comes_later() -> None:
    class Forgiving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            with suppress(RuntimeError):
                self.layer(images)
            return images @ images.T

    assert count(Forgiving(), x(2, 5)) == {"": (20, 20)}


def test_products_are_counted_in_inference_mode_too() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 5)
    )
    expected = count(network, torch.randn(1, 3, 4, 4))
    assert expected["0"] == (432, 432)
    with torch.inference_mode():
        assert count(network, torch.randn(1, 3, 4, 4)) == expected


@pytest.mark.filterwarnings("ignore:.torch.jit.*:FutureWarning")
def test_a_scripted_part_is_counted() -> None:
    network = nn.Sequential(nn.Linear(8, 16), torch.jit.script(nn.Linear(16, 4)))

    assert sum(dense for dense, _ in count(network, x(3, 8)).values()) == 3 * (8 * 16 + 16 * 4)


@pytest.mark.filterwarnings("ignore:.torch.jit.*")
def test_convolutions_of_a_traced_network_are_counted() -> None:
    layer, images = nn.Conv2d(4, 6, 3), x(2, 4, 8, 8)
    half_zero(layer.weight)
    expected = 2 * 6 * 36 * 4 * 9
    assert count(torch.jit.trace(layer, images), images) == {"": (expected, expected // 2)}


def test_zeros_count_in_a_weight_that_autocast_casts() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    for layer in (network[0], network[2]):
        layer.weight.data[: len(layer.weight) // 2] = 0
    with torch.autocast("cpu", torch.bfloat16):
        found = count_macs(network, lambda: network(torch.randn(2, 3, 6, 6)))
    assert {name: one.effective / one.dense for name, one in found.items()} == {"0": 0.5, "2": 0.5}
