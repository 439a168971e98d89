"""Positions and values as byte streams, on their own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimnets.artifact.streams import (
    ArtifactError,
    Reader,
    cost,
    cut_bits,
    gaps_of,
    huffman,
    join,
    mask_of,
    most_gap_bytes,
    positions_of_gaps,
    positions_of_mask,
    split,
    unhuffman,
)


def at(n: int, *positions: int) -> np.ndarray:
    nonzero = np.zeros(n, bool)
    nonzero[list(positions)] = True
    return nonzero


def test_gaps_by_hand() -> None:
    coded, low = gaps_of(at(600, 0, 1, 5, 261, 516))
    # 255 zeros before 261: an escape and none more; 254 before 516: no escape
    assert coded.tolist() == [0, 0, 3, 255, 0, 254]
    assert low.size == 0
    assert positions_of_gaps(coded, low, 600, 5).tolist() == [0, 1, 5, 261, 516]


def test_long_gaps_keep_their_lowest_bits_apart() -> None:
    nonzero = at(10_000, 777, 9_999)
    assert cut_bits(10_000, 2) == 5
    coded, low = gaps_of(nonzero)
    assert coded.tolist() == [777 >> 5, 255, (9_221 >> 5) - 255]
    assert low.tolist() == [0b10010_101, 0b00_000000]  # 777 % 32 and 9221 % 32, lowest bit first
    assert positions_of_gaps(coded, low, 10_000, 2).tolist() == [777, 9_999]


@given(st.integers(0, 3000), st.sampled_from([0.0, 0.001, 0.01, 0.3, 1.0]), st.integers(0, 99))
def test_positions_come_back(n: int, density: float, seed: int) -> None:
    nonzero = np.random.default_rng(seed).random(n) < density
    count = int(nonzero.sum())
    assert (positions_of_mask(mask_of(nonzero), n) == nonzero).all()
    coded, low = gaps_of(nonzero)
    assert coded.size <= most_gap_bytes(n, count)
    assert positions_of_gaps(coded, low, n, count).tolist() == np.flatnonzero(nonzero).tolist()


def test_a_position_beyond_the_end_is_refused() -> None:
    with pytest.raises(ArtifactError, match="position 7 of 7"):
        positions_of_gaps(np.array([2, 4], np.uint8), np.empty(0, np.uint8), 7, 2)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("floating", [True, False])
def test_values_come_back(size: int, floating: bool) -> None:
    bits = np.random.default_rng(0).integers(0, 2 ** (8 * size), 99, f"u{size}", endpoint=False)
    high, low = split(bits, floating=floating)
    assert (high.size, low.size) == (99, 99 * (size - 1))
    assert (join(high, low, size=size, floating=floating) == bits).all()


def test_the_top_byte_of_a_float_is_its_exponent() -> None:
    high, low = split(np.array([1.0, -1.0, 3.0], np.float32).view(np.uint32), floating=True)
    assert high.tolist() == [127, 127, 128]
    assert low.tolist() == [0, 1, 0, *[0, 0, 0], *[0, 0, 128]]  # the sign is the lowest bit


def test_huffman_is_close_to_entropy_and_never_much_worse_than_nothing() -> None:
    generator = np.random.default_rng(0)
    skewed = generator.geometric(0.1, 100_000).clip(max=255).astype(np.uint8)
    assert len(huffman([skewed])) < 1.02 * cost(skewed)
    noise = generator.integers(0, 256, 100_000, np.uint8)
    assert len(huffman([noise])) < 1.001 * noise.size


def test_unlike_parts_get_tables_of_their_own() -> None:
    generator = np.random.default_rng(0)
    parts = [generator.integers(i * 16, i * 16 + 16, 2_000, np.uint8) for i in range(8)]
    together = np.concatenate(parts)
    assert len(huffman(parts)) < 0.65 * len(huffman([together]))
    assert (unhuffman(huffman(parts), together.size, "x") == together).all()


def test_unhuffman_refuses() -> None:
    data = huffman([np.arange(200, dtype=np.uint8)])
    assert unhuffman(data, 200, "gaps").size == 200
    with pytest.raises(ArtifactError, match="'gaps' holds more than the 199 bytes"):
        unhuffman(data, 199, "gaps")
    for damaged in (data[:-1], data + b"x"):
        with pytest.raises(ArtifactError, match="does not end where it should"):
            unhuffman(damaged, 200, "gaps")
    with pytest.raises(ArtifactError, match="Error -3"):
        unhuffman(b"\xff" * 9, 200, "gaps")


def test_a_reader_gives_what_there_is_and_no_more() -> None:
    reader = Reader("gaps", np.array([1, 255, 255, 3, 9, 255], np.uint8))
    assert reader.take_gaps(2, 6).tolist() == [1, 255, 255, 3]
    assert reader.take_gaps(0, 0).size == 0
    assert reader.take(1).tolist() == [9]
    with pytest.raises(ArtifactError, match="0 gaps of 1"):
        reader.take_gaps(1, 9)
    with pytest.raises(ArtifactError, match="1 gaps of 2"):
        Reader("gaps", np.array([1, 255, 3], np.uint8)).take_gaps(2, 2)
    with pytest.raises(ArtifactError, match="1 bytes of 2 are left"):
        reader.take(2)
    with pytest.raises(ArtifactError, match="1 bytes too many"):
        reader.finish()
