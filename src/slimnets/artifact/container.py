"""The safetensors file around the streams, read with distrust."""

import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors

from slimnets.artifact.codec import STREAMS, Coded, encode, pool, tied
from slimnets.artifact.index import VERSION, FileInfo, dump, parse
from slimnets.artifact.streams import ArtifactError, cost
from slimnets.files import PathLike

_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.(\w+)\.original\d*")


def pack(
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    bits: int = 8,
    transposed: Collection[str] = (),
    buffers: Collection[str] = (),
) -> bytes:
    """A state dict as the bytes of a file.

    Args:
        state: Key to tensor.
        dtype: As for :func:`slimnets.save`.
        bits: As for :func:`slimnets.save`.
        transposed: Keys of weights whose output channels are their second dimension.
        buffers: Keys of what is no parameter.

    Raises:
        ValueError: If ``dtype`` is none that is known, or ``bits`` does not go with it.
        TypeError: If a value of ``state`` cannot be stored.
    """
    if dtype not in (None, torch.float16, torch.bfloat16, torch.int8):
        raise ValueError(
            f"dtype={dtype}: expected None for bit-exact, torch.float16, torch.bfloat16 or "
            "torch.int8"
        )
    if not isinstance(bits, Integral) or bits not in range(2, 9):
        raise ValueError(f"bits={bits!r}: expected an int from 2 to 8, such as 6")
    if bits != 8 and dtype is not torch.int8:
        raise ValueError(f"bits={bits}, dtype={dtype}: bits are those of dtype=torch.int8")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{name!r} is a {type(value).__name__}; only tensors can be stored without "
                "pickle, so let get_extra_state return one"
            )

    def arguments(name: str) -> tuple[torch.dtype | None, int, int]:
        # Positions, anchors, masks and other buffers are too delicate for eight bits.
        is_weight = "weight" in place_of(name)[1] and name not in buffers
        stored = dtype if is_weight or dtype is not torch.int8 else None
        return stored, int(name in transposed), bits

    coded, ties = _coded(state, arguments)
    streams = pool([*coded.values()])
    entries = {name: one.entry for name, one in coded.items()}
    info = FileInfo(VERSION, entries, ties, _checksum(streams))
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in streams.items()}
    return safetensors.save(arrays, metadata=dump(info))


def stored_bytes(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Bytes that each tensor of a state dict takes in a file, its entry in the index aside.

    A tensor that stands under several keys counts under the first. What all of them share (Huffman
    tables, rounding) is shared out, so that the sum is that of the file.

    Raises:
        TypeError: If a tensor has no plain values, as in :func:`encode`.

    Examples:
        >>> pruned = torch.zeros(1000)
        >>> pruned[::100] = 1.0
        >>> stored_bytes({"pruned": pruned, "dense": torch.randn(1000)})["pruned"] < 100
        True
    """
    coded, _ = _coded(state)
    total = dict.fromkeys(state, 0.0)
    for stream, data in pool([*coded.values()]).items():
        costs = {n: cost(c.streams[stream]) for n, c in coded.items() if stream in c.streams}
        whole = sum(costs.values())
        for name, own in costs.items():
            total[name] += own / whole * len(data)
    ends = np.rint(np.cumsum([0.0, *total.values()])).astype(int)
    return {name: int(size) for name, size in zip(total, np.diff(ends), strict=True)}


def _coded(
    state: Mapping[str, torch.Tensor], arguments: Callable[[str], tuple[Any, ...]] = lambda _: ()
) -> tuple[dict[str, Coded], dict[str, str]]:
    """Each tensor encoded, with what ``arguments`` gives for its key; and the keys of others."""
    ties, coded = tied(state), {}
    for name, tensor in state.items():
        if name in ties:
            continue
        try:
            coded[name] = encode(tensor, *arguments(name))
        except TypeError as error:
            raise TypeError(f"{name!r}: {error}") from None
    return coded, ties


def place_of(name: str) -> tuple[str, str]:
    """The layer of the tensor ``name`` of a state dict, and what the layer calls it.

    Of what a parametrization computes a tensor from, it is the name of that tensor.

    Examples:
        >>> place_of("up.weight"), place_of("up.parametrizations.weight.original1")
        (('up', 'weight'), ('up', 'weight'))
    """
    if parametrized := _PARAMETRIZED.fullmatch(name):
        return parametrized[1] or "", parametrized[2]
    layer, _, tensor = name.rpartition(".")
    return layer, tensor


def inspect(path: PathLike) -> FileInfo:
    """What a file of :func:`slimnets.save` holds, from its header alone.

    Raises:
        ArtifactError: If the header is damaged or that of another kind of file.
        OSError: If the file cannot be read.
    """
    with naming(path), _opened(path) as file:
        return parse(file.metadata() or {})


def read(path: PathLike) -> tuple[FileInfo, dict[str, bytes]]:
    """The index of a file and its streams, still coded, but verified by their checksum.

    Raises:
        ArtifactError: If the file is damaged or of another kind.
        OSError: If the file cannot be read.
    """
    with _opened(path) as file:
        info = parse(file.metadata() or {})
        names = set(file.keys())
        if not names <= set(STREAMS):
            raise ArtifactError(f"unknown streams {sorted(names - set(STREAMS))}")
        streams = {}
        for name in names:
            if file.get_slice(name).get_dtype() != "U8":
                raise ArtifactError(f"stream {name!r} is not of bytes")
            streams[name] = file.get_tensor(name).tobytes()
    if _checksum(streams) != info.checksum:
        raise ArtifactError("the checksum is wrong: the file is damaged")
    return info, streams


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Let every :class:`ArtifactError` say which file it is about."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from error.__cause__


@contextmanager
def _opened(path: PathLike) -> Iterator[safe_open]:
    if Path(path).is_dir():
        raise IsADirectoryError(f"path={os.fspath(path)!r} is a folder: give the file in it")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        with open(path, "rb") as start:
            if start.read(4) == b"PK\3\4":
                raise ArtifactError(
                    "not a safetensors file but a zip, as torch.save writes; if it is a checkpoint "
                    f"of Lightning, call slimnets.convert_checkpoint({os.fspath(path)!r}, file) "
                    "first, and load that file"
                ) from None
        raise ArtifactError(f"not a whole safetensors file: {error}") from None


def _checksum(streams: Mapping[str, bytes]) -> int:
    checksum = 0
    for name in STREAMS:
        checksum = zlib.crc32(streams.get(name, b""), checksum)
    return checksum
