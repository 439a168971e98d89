"""Files that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]


def target_of(path: PathLike) -> Path:
    """Where a write to ``path`` goes: through a symbolic link, as an ordinary one does.

    Raises:
        FileNotFoundError: If there is no such folder.
        IsADirectoryError: If it is a folder itself.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"path={os.fspath(path)!r} is a folder: give the file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"path={os.fspath(path)!r}: there is no folder {os.fspath(target.parent)!r}; make it "
            "first"
        )
    return target


@contextmanager
def written_whole(path: PathLike) -> Iterator[Path]:
    """A place for a file that takes the place of ``path`` when the block is left without an error.

    Other files that are written beside it, as ONNX does with large weights, go beside ``path``.

    Raises:
        OSError: If that fails; what was at ``path`` is still there.
    """
    target = target_of(path)
    # a folder, so that the file has its name already: exporters look at it and write it down
    with TemporaryDirectory(prefix=".slimnets-", dir=target.parent) as folder:
        beside = Path(folder) / Path(path).name
        yield beside
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == beside):  # it is last
            with file.open("r+b") as written:
                os.fsync(written.fileno())
            place = target if file == beside else target.with_name(file.name)
            if place.exists():
                shutil.copymode(place, file)
            file.replace(place)


def write(path: PathLike, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: If that fails; what was at ``path`` is still there.
    """
    with written_whole(path) as beside:
        beside.write_bytes(data)
