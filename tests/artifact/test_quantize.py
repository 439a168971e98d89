"""Fewer bits a value: how close, and when not at all."""

import math
from typing import Any

import pytest
import torch

from slimnets.artifact.quantize import dequantize, narrow, quantize


@pytest.mark.parametrize(("channel_dim", "bits"), [(0, 8), (1, 8), (0, 6), (1, 2)])
def test_int8_is_within_half_a_step_of_its_channel(channel_dim: int, bits: int) -> None:
    weight = torch.randn(8, 6, 3, 3) * torch.logspace(-4, 3, 8).view(-1, 1, 1, 1)
    multiples, base, relative = quantize(weight, channel_dim, bits)  # type: ignore[misc]
    assert relative.size == weight.shape[channel_dim]
    restored = dequantize(multiples, channel_dim, base, relative)
    others = [dim for dim in range(4) if dim != channel_dim]
    largest = weight.abs().amax(others, keepdim=True)
    # 3 bits of mantissa leave a scale at most an eighth above the ideal one
    most = 2 ** (bits - 1) - 1
    assert ((restored - weight).abs() <= largest / (most + 0.5) * 1.125 / 2 * 1.001).all()
    reached = multiples.abs().amax(others)
    assert (reached >= math.floor((most + 0.5) / 1.125)).all()
    assert (reached <= most).all()


def test_int8_keeps_zeros_and_needs_no_luck_in_rounding() -> None:
    weight = torch.randn(5, 7).masked_fill_(torch.rand(5, 7) < 0.5, 0.0)
    weight[3] = 0.0
    multiples, base, relative = quantize(weight, 0)  # type: ignore[misc]
    restored = dequantize(multiples, 0, base, relative)
    assert (restored[weight == 0] == 0).all()
    # at most 4 bits of scale times 7 of value: the product is exact in float32
    exact = dequantize(multiples.double(), 0, base, relative)
    assert torch.equal(restored.double(), exact)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_rounded_once_is_not_rounded_again(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(2000, 5).to(dtype)
    weight[7] = 0.0
    once = dequantize(*_quantized(weight, bits)).to(dtype)
    assert not torch.equal(once, weight)
    assert torch.equal(dequantize(*_quantized(once, bits)).to(dtype), once)


def _quantized(weight: torch.Tensor, bits: int) -> Any:
    multiples, base, relative = quantize(weight, 0, bits)  # type: ignore[misc]
    return multiples, 0, base, relative


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([[1.0, float("nan")]]),
        torch.tensor([[1.0, float("inf")]]),
        torch.tensor([[1e-20], [1e20]]),
        torch.zeros(2, 2),
        torch.ones(2),
        torch.zeros(0, 2),
        torch.full((1, 1), 3.4e38),
        torch.full((1, 1), 1e300, dtype=torch.float64),
    ],
    ids=["nan", "inf", "range", "zeros", "vector", "empty", "overflow", "float64"],
)
def test_int8_is_not_for_these(weight: torch.Tensor) -> None:
    assert quantize(weight, 0) is None


def test_narrow_rounds_to_plus_zero_and_stays_finite() -> None:
    tensor = torch.tensor([1.0, -1e-30, 0.1, float("inf")])
    narrowed = narrow(tensor, torch.float16)
    assert narrowed.dtype == torch.float16
    assert not narrowed[1].signbit()
    large = torch.tensor([1e5, 1.0])
    assert narrow(large, torch.float16) is large
    assert narrow(large, torch.bfloat16).dtype == torch.bfloat16
