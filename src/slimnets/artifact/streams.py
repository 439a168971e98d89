"""Byte streams: positions and values split into them, Huffman-coded, and read back with care."""

import zlib
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Bits: TypeAlias = NDArray[Any]  # unsigned integers

_ESCAPE = 255
_BLOCK = 2**15 - 1  # bytes that zlib codes with one table, at memLevel=9
_TABLE_BITS = 4  # that a Huffman table takes for each symbol in it
_LONG_GAP = 200  # mean from which escapes cost more than bits cut off and stored as they are


class ArtifactError(ValueError):
    """A file that is damaged, hostile, or of another network."""


def mask_of(nonzero: NDArray[np.bool_]) -> Bytes:
    """``nonzero`` as one bit a value."""
    return np.packbits(nonzero)


def positions_of_mask(mask: Bytes, n: int) -> NDArray[np.bool_]:
    """Undo :func:`mask_of`, given the number of values."""
    return np.unpackbits(mask, count=n).view(np.bool_)


def gaps_of(nonzero: NDArray[np.bool_]) -> tuple[Bytes, Bytes]:
    """How many zeros come before each other value.

    Returns:
        The gaps, one byte each, where 255 adds that many zeros and goes on in the next byte; and
        the lowest :func:`cut_bits` bits of each, packed.
    """
    positions = np.flatnonzero(nonzero)
    gaps = np.diff(positions, prepend=-1) - 1
    cut = cut_bits(nonzero.size, positions.size)
    low = np.packbits((gaps[:, None] >> np.arange(cut)) & 1 != 0)
    gaps >>= cut
    ends = np.cumsum(gaps // _ESCAPE + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if ends.size else 0, _ESCAPE, np.uint8)
    coded[ends] = gaps % _ESCAPE
    return coded, low


def positions_of_gaps(coded: Bytes, low: Bytes, n: int, nonzeros: int) -> NDArray[np.int64]:
    """Undo :func:`gaps_of`.

    Raises:
        ArtifactError: If a position lies beyond ``n``.
    """
    cut = cut_bits(n, nonzeros)
    is_end = coded != _ESCAPE
    total = np.cumsum(coded, dtype=np.int64)[is_end]
    gaps = np.diff(total, prepend=0) << cut
    bits = np.unpackbits(low, count=nonzeros * cut).reshape(nonzeros, cut)
    gaps += bits @ (1 << np.arange(cut))
    positions = np.cumsum(gaps + 1) - 1
    if positions.size and positions[-1] >= n:
        raise ArtifactError(f"stream 'gaps': position {positions[-1]} of {n} values")
    return positions


def cut_bits(n: int, nonzeros: int) -> int:
    """How many of the lowest bits of each gap are stored apart; 0 below 99.5 % zeros."""
    return (n // (_LONG_GAP * nonzeros)).bit_length() if nonzeros else 0


def most_gap_bytes(n: int, nonzeros: int) -> int:
    """Upper bound on the bytes of :func:`gaps_of`."""
    return nonzeros + (n >> cut_bits(n, nonzeros)) // _ESCAPE


def split(bits: Bits, *, floating: bool) -> tuple[Bytes, Bytes]:
    """Values as their top bytes, and their other bytes plane by plane.

    A float is rotated left by one bit, so that its top byte is exponent without the sign: what of
    it a Huffman code shortens.
    """
    size = bits.itemsize
    if floating and size > 1:
        bits = (bits << 1) | (bits >> (8 * size - 1))
    planes = bits.astype(f"<u{size}", copy=False).view(np.uint8).reshape(-1, size)
    return planes[:, -1].copy(), planes[:, :-1].T.reshape(-1)


def join(high: Bytes, low: Bytes, *, size: int, floating: bool) -> Bits:
    """Undo :func:`split` for values of ``size`` bytes."""
    planes = np.empty((high.size, size), np.uint8)
    planes[:, -1] = high
    for i, plane in enumerate(low.reshape(size - 1, high.size)):
        planes[:, i] = plane
    bits: Bits = planes.reshape(-1).view(f"<u{size}").astype(f"=u{size}", copy=False)
    if floating and size > 1:
        bits = (bits >> 1) | (bits << (8 * size - 1))
    return bits


def cost(stream: Bytes) -> float:
    """About the bytes that a Huffman code makes of ``stream``."""
    return _entropy(_counts(stream)) / 8


def huffman(parts: Iterable[Bytes]) -> bytes:
    """The concatenation of ``parts`` as raw deflate data.

    Without LZ77, which finds nothing in our streams and takes long. Each part starts a new block
    where a Huffman table of its own saves more than it costs.
    """
    coder = zlib.compressobj(level=9, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    coded, block = [], np.zeros(256)
    for part in parts:
        counts = _counts(part)
        table = _TABLE_BITS * np.count_nonzero(counts)
        if _entropy(block) + _entropy(counts) + table < _entropy(block + counts):
            coded.append(coder.flush(zlib.Z_BLOCK))
            block[:] = 0
        coded.append(coder.compress(part.data))
        block += counts
        block *= block.sum() % _BLOCK / max(block.sum(), 1)  # zlib's own blocks are full at that
    return b"".join([*coded, coder.flush()])


def unhuffman(data: bytes, most: int, name: str) -> Bytes:
    """Undo :func:`huffman`, given the most bytes that may come out.

    Raises:
        ArtifactError: If ``data`` is not one whole deflate stream of at most that many bytes.
    """
    decoder = zlib.decompressobj(wbits=-15)
    try:
        stream = decoder.decompress(data, most + 1)
    except zlib.error as error:
        raise ArtifactError(f"stream {name!r}: {error}") from None
    if len(stream) > most:
        raise ArtifactError(f"stream {name!r} holds more than the {most} bytes that are due")
    if not decoder.eof or decoder.unused_data:
        raise ArtifactError(f"stream {name!r} does not end where it should")
    return np.frombuffer(stream, np.uint8)


class Reader:
    """Reads one stream from the front, never beyond its end."""

    def __init__(self, name: str, stream: Bytes) -> None:
        self.name, self.stream, self.at = name, stream, 0

    def take(self, size: int) -> Bytes:
        """The next ``size`` bytes.

        Raises:
            ArtifactError: If there are fewer.
        """
        left = self.stream.size - self.at
        if size > left:
            raise ArtifactError(f"stream {self.name!r} is short: {left} bytes of {size} are left")
        self.at += size
        return self.stream[self.at - size : self.at]

    def take_gaps(self, count: int, most: int) -> Bytes:
        """The next bytes up to the one that ends the ``count``-th gap, which are ``most`` or fewer.

        Raises:
            ArtifactError: If fewer gaps end in them.
        """
        ends = np.flatnonzero(self.stream[self.at : self.at + most] != _ESCAPE)[:count]
        if ends.size < count:
            raise ArtifactError(f"stream {self.name!r} is short: {ends.size} gaps of {count}")
        return self.take(int(ends[-1]) + 1 if count else 0)

    def finish(self) -> None:
        """Raise ArtifactError if bytes are left over."""
        if self.at != self.stream.size:
            raise ArtifactError(
                f"stream {self.name!r}: {self.stream.size - self.at} bytes too many"
            )


def _counts(stream: Bytes) -> NDArray[np.float64]:
    return np.bincount(stream, minlength=256).astype(np.float64)


def _entropy(counts: NDArray[np.float64]) -> float:
    """Bits that a Huffman code takes for symbols counted so; at least one for each."""
    counts = counts[counts > 0]
    total = float(counts.sum())
    return max(float(counts @ np.log2(total / counts)), total)
