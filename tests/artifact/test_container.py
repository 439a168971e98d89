"""Files: their size against the limit."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import numpy as safetensors
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from slimnets.artifact.container import inspect, pack
from slimnets.artifact.quantize import quantize
from slimnets.files import write


def convolutional(width: int, sparsity: float) -> dict[str, Tensor]:
    """The state dict of a pruned VGG-19 with ``width`` channels in its first layer."""
    plan = [1, 1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8, 8, 8]
    channels = [3, *(width * size for size in plan)]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU()]
    state = nn.Sequential(*layers, nn.Linear(channels[-1], 10)).state_dict()
    for tensor in state.values():
        if tensor.dim() > 1:
            tensor.normal_(0, 0.05)
            count = round(sparsity * tensor.numel())
            tensor[tensor.abs() <= tensor.abs().flatten().kthvalue(count).values] = 0.0
        elif tensor.dim():
            tensor.normal_(1, 0.1)
    return state


def limit(state: dict[str, Tensor], dtype: torch.dtype | None) -> float:
    """Bytes that theory allows, nothing allowed for names, shapes and int8's scales."""
    total = 0.0
    for tensor in state.values():
        quantized = quantize(tensor, 0) if dtype is torch.int8 else None
        if quantized:
            values = quantized[0][quantized[0] != 0]
            total += entropy(values.unique(return_counts=True)[1]) / 8
            stored: Tensor = quantized[0]
        else:
            smaller = dtype if dtype and dtype.is_floating_point else tensor.dtype
            stored = tensor.to(smaller) if tensor.is_floating_point() else tensor
            total += int(stored.count_nonzero()) * stored.itemsize
        nonzeros = int(stored.count_nonzero())
        total += entropy(torch.tensor([nonzeros, stored.numel() - nonzeros])) / 8
    return total


def entropy(counts: Tensor) -> float:
    """Bits of as many symbols as ``counts`` sum up to."""
    counts = counts[counts > 0].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("sparsity", "width"), [(0.5, 8), (0.75, 8), (0.9, 16), (0.95, 16), (0.99, 32), (0.995, 40)]
)
def test_a_file_is_no_larger_than_theory_says(
    sparsity: float, width: int, dtype: torch.dtype | None
) -> None:
    state = convolutional(width, sparsity)
    data = pack(state, dtype)
    assert len(data) > 95_000
    # exponents of floats are no noise, so that these are well below it
    assert len(data) < (1.02 if dtype is torch.int8 else 0.9) * limit(state, dtype)


def test_a_small_file_is_small() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    assert len(pack(net.state_dict())) < 46 * 4 + 500


def test_it_is_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    write(path, pack(convolutional(1, 0.9)))
    streams = safetensors.load_file(path)
    assert set(streams) == {"gaps", "high", "low"}
    assert {array.dtype.name for array in streams.values()} == {"uint8"}


def test_inspect_says_what_is_stored_and_what_is_not_exact(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    weight = torch.randn(6, 4)
    state = {
        "a.weight": weight,
        "b.weight": weight,
        "a.bias": torch.ones(6),
        "step": torch.tensor(3),
    }
    write(path, pack(state, torch.float16))
    info = inspect(path)
    assert info.version == 1
    assert info.ties == {"b.weight": "a.weight"}
    assert info.shapes == {name: tensor.shape for name, tensor in state.items()}
    # ones are the same in float16, and integers are left alone
    assert info.inexact == {"a.weight": torch.float16}
    write(path, pack(state))
    assert info.inexact != inspect(path).inexact == {}


def test_int8_is_for_weights_alone(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    state = {"weight": torch.randn(3, 3), "position": torch.randn(3, 3), "bias": torch.randn(3)}
    write(path, pack(state, torch.int8))
    assert inspect(path).inexact == {"weight": torch.int8}


def test_transposed_weights_have_their_channels_in_the_second_dimension(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    write(path, pack({"weight": torch.randn(3, 5, 2)}, torch.int8, transposed={"weight"}))
    scale = inspect(path).tensors["weight"].scale
    assert scale is not None
    assert scale[0] == 1


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int4 if hasattr(torch, "int4") else 8, "int8"]
)
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"^dtype=.*torch.int8"):
        pack({}, dtype)


@pytest.mark.parametrize("value", [{"epoch": 3}, None, torch.eye(2).to_sparse()])
def test_what_is_no_plain_tensor_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match=r"'queue\._extra_state'"):
        pack({"weight": torch.ones(1), "queue._extra_state": value})


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weights_that_are_computed_from_parameters_are_rounded_too(norm) -> None:
    """As those of ``torch.nn.utils.weight_norm`` are, whose parameters are called weight_v."""
    network = nn.Sequential(norm(nn.Linear(64, 64)))
    buffers = {name for name, _ in network.named_buffers()}

    exact, rounded = (
        len(pack(network.state_dict(), dtype=dtype, buffers=buffers))
        for dtype in (None, torch.int8)
    )

    assert rounded < 0.4 * exact
