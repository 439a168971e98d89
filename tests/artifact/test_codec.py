"""Tensors to streams and back: bit for bit, and at the size that theory allows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slimnets.artifact.codec import DTYPES, decode, encode, pool, same_bits, tied
from slimnets.artifact.container import stored_bytes
from slimnets.artifact.streams import ArtifactError


def round_trip(*tensors: torch.Tensor, stored: torch.dtype | None = None) -> list[torch.Tensor]:
    coded = [encode(tensor, stored) for tensor in tensors]
    return decode([one.entry for one in coded], pool(coded))


def noise(shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int) -> torch.Tensor:
    """Random bits (so NaNs, infinities and subnormals too), and zeros."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    most = 2 if dtype == torch.bool else 256
    bits = torch.randint(most, (count, dtype.itemsize), generator=generator, dtype=torch.uint8)
    bits *= torch.rand(count, 1, generator=generator) < density
    return bits.view(-1).view(dtype).view(shape)


tensors = st.builds(
    noise,
    st.lists(st.integers(0, 12), max_size=4).map(tuple),
    st.sampled_from(list(DTYPES.values())),
    st.sampled_from([0.0, 0.001, 0.05, 0.5, 0.9, 1.0]),
    st.integers(0, 2**32),
)


@given(st.lists(tensors, max_size=5))
def test_every_bit_comes_back(originals: list[torch.Tensor]) -> None:
    for original, restored in zip(originals, round_trip(*originals), strict=True):
        assert restored.dtype == original.dtype
        assert restored.shape == original.shape
        assert same_bits(restored, original)


@given(st.sampled_from(["float16", "bfloat16", "int8"]), st.lists(tensors, max_size=3))
def test_lossy_dtypes_take_any_tensor(stored: str, originals: list[torch.Tensor]) -> None:
    coded = [encode(tensor, getattr(torch, stored)) for tensor in originals]
    restored = decode([one.entry for one in coded], pool(coded))
    for one, before, after in zip(coded, originals, restored, strict=True):
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert one.entry.exact == same_bits(after, before)


def test_special_floats() -> None:
    payload = torch.tensor([0x7FC01234, 0x7F800001, 0x00000001, 0x7F800000], dtype=torch.int32)
    special = torch.cat([payload.view(torch.float32), torch.tensor([-0.0, 0.0, -math.inf])])
    spread = torch.zeros(1000)
    spread[::150] = special
    for tensor in (special, spread):
        assert same_bits(round_trip(tensor)[0], tensor)
    assert encode(spread).entry.nonzeros == 6  # -0.0 is a value, 0.0 is not


def test_strides_do_not_matter() -> None:
    base = torch.randn(6, 8)
    views = [
        base.t(),
        base[:, ::3],
        torch.randn(3, 1).expand(3, 5),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.randn(4, dtype=torch.complex64).conj(),
        nn.Parameter(torch.randn(3)),
    ]
    for view, restored in zip(views, round_trip(*views), strict=True):
        assert torch.equal(restored, view)


@pytest.mark.parametrize(
    ("sparsity", "layout"),
    [(0.0, "dense"), (0.01, "mask"), (0.5, "mask"), (0.6, "mask"), (0.95, "gaps"), (1.0, "gaps")],
)
def test_the_smallest_layout_is_taken(sparsity: float, layout: str) -> None:
    weight = torch.randn(50_000).masked_fill_(torch.rand(50_000) < sparsity, 0.0)
    assert encode(weight).entry.layout == layout


def binary_entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0.0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999])
def test_noise_takes_what_theory_says(sparsity: float, dtype: str) -> None:
    """No structure in the values to gain from: positions alone must be within the limit."""
    values = noise((2_000_000,), getattr(torch, dtype), 1 - sparsity, seed=0)
    coded = encode(values)
    size = sum(map(len, pool([coded]).values()))
    density = coded.entry.nonzeros / 2_000_000
    limit = coded.entry.nonzeros * values.itemsize + 2_000_000 * binary_entropy(density) / 8
    assert size < 1.01 * limit + 80  # a Huffman table, for files of a few kB


def test_exponents_of_weights_take_less_than_theory_says_of_noise() -> None:
    weight = torch.randn(100_000)
    assert sum(map(len, pool([encode(weight)]).values())) < 0.85 * weight.nbytes


def test_huge_and_almost_empty() -> None:
    tensor = torch.zeros(2**26, dtype=torch.uint8)
    tensor[-1] = 1
    tensor[12345678] = 2
    coded = encode(tensor)
    assert sum(map(len, pool([coded]).values())) < 100
    assert torch.equal(decode([coded.entry], pool([coded]))[0], tensor)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(3).to_sparse(), "only plain dense"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "plain"),
        (torch.empty(3, device="meta"), "meta device"),
        (nn.LazyLinear(3).weight, "no values yet; run one batch"),
    ],
    ids=["coo", "nested", "meta", "lazy"],
)
def test_what_has_no_plain_values_is_refused(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encode(tensor)


def test_ties_are_views_of_the_same_memory() -> None:
    weight = torch.randn(4, 4)
    state = {"a": weight, "b": weight.view(4, 4), "c": weight.t(), "d": weight.clone()}
    state |= {"e": torch.empty(0), "f": torch.empty(0)}
    values = torch.randn(4, dtype=torch.complex64)
    state |= {"g": values, "h": values.conj(), "i": values.imag, "j": values.conj().imag}
    assert tied(state) == {"b": "a"}


def test_stored_bytes_sum_up_to_the_streams() -> None:
    pruned = torch.randn(64, 99).masked_fill_(torch.rand(64, 99) < 0.9, 0.0)
    state = {"w": pruned, "tied": pruned, "b": torch.randn(64), "n": torch.tensor(7)}
    sizes = stored_bytes(state)
    coded = [encode(state[name]) for name in ("w", "b", "n")]
    assert sum(sizes.values()) == sum(map(len, pool(coded).values()))
    assert sizes["tied"] == 0
    assert 2000 < sizes["w"] < 2700
    assert 192 < sizes["b"] < 300
    assert stored_bytes({}) == {}


def test_streams_that_do_not_fit_are_refused() -> None:
    weight = torch.randn(1000).masked_fill_(torch.rand(1000) < 0.9, 0.0)
    coded = encode(weight)
    data = pool([coded])
    other = encode(torch.randn(1000).masked_fill_(torch.rand(1000) < 0.5, 0.0))
    for entry, streams in [
        (coded.entry, {}),
        (coded.entry, data | {"low": data["low"] + b"x"}),
        (coded.entry, data | {"low": data["low"][:-1]}),
        (coded.entry, data | {"masks": pool([other])["masks"]}),
        (other.entry, data),
    ]:
        with pytest.raises(ArtifactError):
            decode([entry], streams)


def test_a_mask_with_another_count_is_refused() -> None:
    first = encode(torch.tensor([1.0, 0.0] * 50))
    second = encode(torch.tensor([1.0, 1.0, 0.0, 0.0] * 24 + [0.0] * 4))
    with pytest.raises(ArtifactError, match="'masks': 48 values of 50"):
        decode([first.entry], pool([first]) | {"masks": pool([second])["masks"]})


def test_a_bool_is_0_or_1() -> None:
    flag = encode(torch.tensor([True]))
    number = pool([encode(torch.tensor([2], dtype=torch.uint8))])
    with pytest.raises(ArtifactError, match="bool"):
        decode([flag.entry], number)
