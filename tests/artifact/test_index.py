"""Files of those who mean harm, and of damaged disks: refused, whatever they say."""

import base64
import copy
import json
import os
import random
import resource
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import numpy as safetensors
from torch import Tensor, nn

from slimnets.artifact.codec import decode, same_bits
from slimnets.artifact.container import pack, read
from slimnets.artifact.file import load
from slimnets.artifact.index import VERSION
from slimnets.artifact.streams import ArtifactError
from slimnets.files import write

# set SLIMNETS_MUTATIONS for more
MUTATIONS = int(os.environ.get("SLIMNETS_MUTATIONS", "3000"))


class Example(nn.Module):
    """Every layout and kind of value that a file can have."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(30, 20)
        self.b = nn.Linear(30, 20, bias=False)
        self.b.weight = self.a.weight
        with torch.no_grad():
            self.a.weight[self.a.weight.abs() < 0.15] = 0.0
        sparse = torch.zeros(5000)
        sparse[::400] = 1.0
        self.register_buffer("sparse", sparse)
        self.register_buffer("halves", torch.tensor([[1.0, 0.0]] * 9, dtype=torch.float16))
        self.register_buffer("steps", torch.tensor(7))


def values_of(network: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in network.state_dict().values()]


def is_refused(path: Path, data: bytes, network: nn.Module, before: list[Tensor]) -> bool:
    """Whether ``load`` refuses a file; it must raise its own error then, and change nothing."""
    path.write_bytes(data)
    try:
        load(path, network)
    except ArtifactError:
        now = network.state_dict().values()
        assert all(same_bits(a, b) for a, b in zip(now, before, strict=True))
        return True
    return False


def assemble(index: Any, streams: dict[str, bytes], version: str = "1") -> bytes:
    """A file with any index and streams, as one would write it who means harm."""
    checksum = 0
    for name in ("masks", "gaps", "scales", "high", "low"):
        checksum = zlib.crc32(streams.get(name, b""), checksum)
    if isinstance(index, dict) and "crc32" in index:
        index = index | {"crc32": checksum}
    packed = base64.b85encode(zlib.compress(json.dumps(index).encode())).decode()
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in streams.items()}
    return safetensors.save(arrays, metadata={"slimnets": f"{version} {packed}"})


def taken_apart(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    write(path, data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    _, _, packed = header["__metadata__"]["slimnets"].partition(" ")
    index = json.loads(zlib.decompress(base64.b85decode(packed)))
    return index, read(path)[1]


def opened(path: Path, data: bytes) -> list[Tensor]:
    """What a file holds, whatever network it may be for."""
    path.write_bytes(data)
    info, streams = read(path)
    return decode(list(info.tensors.values()), streams)


@pytest.mark.timeout(3600)
def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Bytes changed, cut off, put in, at random; mostly in the header, where most can break."""
    generator = random.Random(0)
    whole = pack(Example().state_dict(), torch.int8)
    network = Example()
    before = values_of(network)
    for _ in range(MUTATIONS // 2):
        data = bytearray(whole)
        while data == whole:
            for _ in range(generator.randrange(1, 4)):
                where = generator.randrange(len(data) if generator.random() < 0.3 else 900)
                data[where : where + generator.randrange(9)] = generator.randbytes(
                    generator.randrange(9)
                )
            if generator.random() < 0.2:
                del data[generator.randrange(len(data)) :]
        assert is_refused(tmp_path / "file", bytes(data), network, before)


@pytest.mark.timeout(3600)
def test_hostile_files_are_refused(tmp_path: Path) -> None:
    """The checksum is right; the index or the streams are not."""
    generator = random.Random(0)
    index, streams = taken_apart(tmp_path / "file", pack(Example().state_dict(), torch.int8))
    values = [-1, 0, 1, 2, 7, 20, 2**31, 2**63, 10**30, 0.5, True, None, "", "int8", "float32"]
    values += ["gaps", "mask", "a.bias", [], [0], [2**40, 2**40], [20, 30], {}, {"shape": 3}]
    network = Example()
    before = values_of(network)
    refused = 0
    for _ in range(MUTATIONS // 2):
        bad_index, bad_streams = copy.deepcopy(index), dict(streams)
        if generator.random() < 0.6:
            place: Any = bad_index
            key: Any = generator.choice(list(place))
            while isinstance(place[key], dict | list) and place[key] and generator.random() < 0.9:
                place = place[key]
                key = generator.choice(
                    list(place) if isinstance(place, dict) else range(len(place))
                )
            place[key] = generator.choice(values)
        else:
            name = generator.choice(list(streams))
            data = bytearray(streams[name])
            where = generator.randrange(len(data))
            data[where : where + generator.randrange(4)] = generator.randbytes(
                generator.randrange(4)
            )
            bad_streams[name] = bytes(data)
        if is_refused(tmp_path / "file", assemble(bad_index, bad_streams), network, before):
            refused += 1
        else:
            before = values_of(network)
    assert refused > 0.5 * MUTATIONS // 2  # the others are whole files of other values


def entry(**changes: Any) -> dict[str, Any]:
    tensor = {"dtype": "float32", "shape": [10], "layout": "gaps", "nonzeros": 3} | changes
    return {"tensors": {"w": tensor}, "ties": {}, "crc32": 0}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "not a JSON object"),
        ({"tensors": {}}, "expected tensors, ties and crc32"),
        ({"tensors": [], "ties": {}, "crc32": 0}, "tensors is not a JSON object"),
        (entry(shape=[-1]), "'w': shape: -1"),
        (entry(shape=[2**39, 2**39]), "'w': a tensor of .* values"),
        (entry(shape=[0, 2**60]), "'w': shape"),
        (entry(shape=[True]), "'w': shape: True"),
        (entry(shape="10"), "'w': shape"),
        (entry(shape=[1] * 100), "'w' is described"),
        (entry(nonzeros=11), "'w': nonzeros: 11"),
        (entry(nonzeros=3.0), "'w': nonzeros: 3.0"),
        (entry(dtype="object"), "'w' is described"),
        (entry(dtype=["float32"]), "'w' is described"),
        (entry(layout="list"), "'w' is described"),
        (entry(stored="float16"), "'w' is described"),
        (entry(stored="int8", exact=False), "'w' is described"),
        (entry(stored="int8", exact=False, scale=[1, 900]), "'w': scale: 1"),
        (entry(stored="float64", exact=False), "'w' is described"),
        (entry(extra=1), "'w' is described"),
        ({"tensors": {"w": 3}, "ties": {}, "crc32": 0}, "'w' is described by 3"),
        ({"tensors": {}, "ties": {"b": "a"}, "crc32": 0}, "'b' cannot be tied to 'a'"),
        ({"tensors": {}, "ties": {}, "crc32": -1}, "crc32"),
        (entry(), "'gaps' is short"),
    ],
)
def test_an_index_that_is_wrong_says_where(tmp_path: Path, index: Any, message: str) -> None:
    data = assemble(index, {})
    if isinstance(index, dict) and index.get("crc32") == -1:
        packed = base64.b85encode(zlib.compress(json.dumps(index).encode())).decode()
        data = safetensors.save({}, metadata={"slimnets": f"1 {packed}"})
    with pytest.raises(ArtifactError, match=message):
        opened(tmp_path / "file", data)


def indexed(text: bytes) -> bytes:
    packed = base64.b85encode(zlib.compress(text)).decode()
    return safetensors.save({}, metadata={"slimnets": f"1 {packed}"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a whole safetensors file"),
        (b"\x80\x04pickle", "not a whole safetensors file"),
        (safetensors.save({"w": np.zeros(3)}), "has no 'slimnets'"),
        (assemble({}, {}, version=str(VERSION + 1)), f"newer than {VERSION}.*upgrade"),
        (assemble({}, {}, version="1.5"), "'1.5' is not a number"),
        (assemble({}, {}, version="9" * 5000), "is not a number"),
        (indexed(b"[" * 100_000), "index"),
        (indexed(b'{"tensors": {"w": 1, "w": 2}}'), "stands twice"),
        (indexed(b"1" * 10_000), "index"),
        (indexed(bytes(100_000_000)), "too large to be one"),
    ],
    ids=["empty", "pickle", "foreign", "newer", "float", "long", "deep", "twice", "digits", "bomb"],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        opened(tmp_path / "file", data)


def test_streams_of_another_kind_are_refused(tmp_path: Path) -> None:
    index = {"tensors": {}, "ties": {}, "crc32": 0}
    with pytest.raises(ArtifactError, match="unknown streams"):
        opened(tmp_path / "file", assemble(index, {"pickle": b"x"}))
    data = assemble(index, {"low": b"abcd"}).replace(b'"U8"', b'"I8"')
    with pytest.raises(ArtifactError, match="'low' is not of bytes"):
        opened(tmp_path / "file", data)


def test_a_bomb_takes_no_more_memory_than_the_index_declares(tmp_path: Path) -> None:
    bomb = zlib.compressobj(wbits=-15)
    data = bomb.compress(bytes(200_000_000)) + bomb.flush()
    index = entry(layout="mask")
    resource_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match="'masks' holds more than the 2 bytes"):
        opened(tmp_path / "file", assemble(index, {"masks": data}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resource_before < 50_000  # kB
