"""The index of a file: what is stored of which tensor, as compact JSON, read with distrust."""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from slimnets.artifact.codec import DTYPES, Entry
from slimnets.artifact.streams import ArtifactError

VERSION = 1
KEY = "slimnets"
"""Of the metadata: the version of the format, a blank, and the index."""

_MOST_TEXT = 64 * 2**20  # bytes of JSON, half a million tensors: where a zip bomb is cut off
_MOST_VALUES = 2**40
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileInfo:
    """What a file holds.

    Attributes:
        version: Of the format.
        tensors: Key of the state dict to what the file says of the tensor.
        ties: Further keys of a tensor, with the key that it is stored under.
        checksum: CRC-32 of the stored streams.
    """

    version: int
    tensors: dict[str, Entry]
    ties: dict[str, str]
    checksum: int

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every key of the state dict."""
        shapes = {name: torch.Size(entry.shape) for name, entry in self.tensors.items()}
        return shapes | {name: shapes[first] for name, first in self.ties.items()}

    @property
    def inexact(self) -> dict[str, torch.dtype]:
        """The tensors that do not come back bit for bit, with what their values were stored as."""
        return {name: entry.stored for name, entry in self.tensors.items() if not entry.exact}


def dump(info: FileInfo) -> dict[str, str]:
    """``info`` as metadata of a safetensors file.

    It is one string, since safetensors writes several in any order, and equal networks should give
    equal files.
    """
    tensors = {name: _as_json(entry) for name, entry in info.tensors.items()}
    index = {"tensors": tensors, "ties": info.ties, "crc32": info.checksum}
    text = json.dumps(index, separators=(",", ":")).encode()
    packed = base64.b85encode(zlib.compress(text, 9)).decode()
    return {KEY: f"{info.version} {packed}"}


def parse(metadata: Mapping[str, str]) -> FileInfo:
    """Undo :func:`dump`.

    Raises:
        ArtifactError: If that is not possible.
    """
    if KEY not in metadata:
        raise ArtifactError(f"not a file of slimnets.save: its metadata has no {KEY!r}")
    version, _, packed = metadata[KEY].partition(" ")
    if not (version.isdecimal() and version.isascii() and len(version) < 10):
        raise ArtifactError(f"format version {version!r} is not a number")
    if int(version) > VERSION:
        raise ArtifactError(
            f"format version {version} is newer than {VERSION}, the newest that is known here; "
            "upgrade slimnets"
        )
    index = _unpack(packed)
    if set(index) != {"tensors", "ties", "crc32"}:
        raise ArtifactError(f"index: expected tensors, ties and crc32, found {sorted(index)}")
    tensors = {name: _as_entry(name, one) for name, one in _mapping(index, "tensors").items()}
    ties = _mapping(index, "ties")
    for name, first in ties.items():
        if not isinstance(first, str) or first not in tensors or name in tensors:
            raise ArtifactError(f"index: {name!r} cannot be tied to {first!r}")
    checksum = _number(index["crc32"], 2**32, "crc32")
    return FileInfo(int(version), tensors, ties, checksum)


def _unpack(packed: str) -> dict[str, Any]:
    decoder = zlib.decompressobj()
    try:
        text = decoder.decompress(base64.b85decode(packed), _MOST_TEXT)
        if not decoder.eof:
            raise ArtifactError("index: cut off, or too large to be one")
        index = json.loads(text, object_pairs_hook=_without_duplicates)
    except ArtifactError:
        raise
    except (ValueError, zlib.error, RecursionError) as error:
        raise ArtifactError(f"index: {error}") from None
    if not isinstance(index, dict):
        raise ArtifactError("index: not a JSON object")
    return index


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ArtifactError("index: a name stands twice")
    return found


def _as_json(entry: Entry) -> dict[str, Any]:
    record: dict[str, Any] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape}
    if entry.layout != "dense":
        record |= {"layout": entry.layout, "nonzeros": entry.nonzeros}
    if entry.stored != entry.dtype:
        record |= {"stored": _NAMES[entry.stored], "exact": entry.exact}
    if entry.scale:
        record["scale"] = entry.scale
    return record


def _as_entry(name: str, record: Any) -> Entry:
    """The entry that ``record`` describes, if it is one that :func:`_as_json` can have written."""
    try:
        entry = _checked(dict(record))
    except ArtifactError as error:
        raise ArtifactError(f"index: {name!r}: {error}") from None
    except (TypeError, ValueError, KeyError) as error:
        raise ArtifactError(f"index: {name!r} is described by {record!r:.200}") from error
    if json.dumps(_as_json(entry), sort_keys=True) != json.dumps(record, sort_keys=True):
        raise ArtifactError(f"index: {name!r} is described by {record!r:.200}")
    return entry


def _checked(record: dict[str, Any]) -> Entry:
    dtype = DTYPES[record["dtype"]]
    stored = DTYPES[record.get("stored", record["dtype"])]
    shape = tuple(_number(size, _MOST_VALUES, "shape") for size in record["shape"])
    layout, exact = record.get("layout", "dense"), record.get("exact", True)
    if layout not in ("dense", "mask", "gaps") or not isinstance(exact, bool) or len(shape) > 64:
        raise ValueError
    scale = None
    if "scale" in record:
        dim, base = record["scale"]
        scale = (_number(dim, len(shape), "scale"), _number(base, 2**11, "scale"))
    narrower = dtype.is_floating_point and stored.itemsize < dtype.itemsize
    scaled = stored is torch.int8 and scale is not None
    if stored != dtype and not (narrower and (scaled or stored.is_floating_point)):
        raise ValueError
    entry = Entry(shape, dtype, stored, exact, layout, 0, scale)
    count = entry.count
    if count > _MOST_VALUES:
        raise ArtifactError(f"a tensor of {count} values")
    nonzeros = count if layout == "dense" else _number(record["nonzeros"], count + 1, "nonzeros")
    return replace(entry, nonzeros=nonzeros)


def _number(value: Any, end: int, what: str) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise ArtifactError(f"{what}: {value!r:.50} is not a whole number from 0 to {end - 1}")
    return value


def _mapping(index: dict[str, Any], key: str) -> dict[str, Any]:
    value = index[key]
    if not isinstance(value, dict):
        raise ArtifactError(f"index: {key} is not a JSON object")
    return value
