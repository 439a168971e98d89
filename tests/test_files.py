"""Files are written whole or not at all."""

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from slimnets.files import write, written_whole


def test_a_link_is_followed_and_permissions_are_kept_or_usual(
    tmp_path: Path,
) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to("there/file")
    write(link, b"new")
    assert link.is_symlink()
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert (tmp_path / "there/file").stat().st_mode == plain.stat().st_mode
    plain.chmod(0o600)
    write(plain, b"new")
    assert plain.stat().st_mode & 0o777 == 0o600


def test_files_beside_it_come_along(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").symlink_to("net")
    with written_whole(tmp_path / "net.onnx") as beside:
        assert beside.name == "net.onnx"
        beside.with_name("net.onnx.data").write_bytes(b"weights")
        beside.write_bytes(b"graph")
        assert not list(tmp_path.glob("net*[!x]"))
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {
        "net": b"graph",
        "net.onnx": b"graph",
        "net.onnx.data": b"weights",
    }


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"previous")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(path, bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"previous"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_read_only_folder_leaves_the_previous_file() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(b"previous")
        path.parent.chmod(0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may write anywhere
        try:
            with pytest.raises(PermissionError):
                write(path, b"new")
        finally:
            os.seteuid(user)
            path.parent.chmod(0o755)
        assert path.read_bytes() == b"previous"


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "file"
    with pytest.raises(FileNotFoundError) as raised:
        write(path, b"new")
    folder = str(path.parent.resolve())
    assert str(raised.value) == f"path={str(path)!r}: there is no folder {folder!r}; make it first"


def test_a_folder_in_the_place_of_the_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match=r"path='.*file' is a folder: give the file in it"):
        write(tmp_path / "file", b"new")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # it only writes files
def test_a_killed_save_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process saves other bytes again and again, and is killed at another moment each time."""
    path = tmp_path / "file"
    size = 3_000_000
    write(path, bytes(size))
    generator = random.Random(0)
    cut_short = 0
    for _ in range(50):
        begun, begins = os.pipe()
        child = os.fork()
        if not child:
            try:
                while True:
                    os.write(begins, b"!")
                    write(path, generator.randbytes(1) * size)
            finally:
                os._exit(1)
        os.read(begun, 1)  # on a busy machine it would not have begun
        time.sleep(generator.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(begun)
        os.close(begins)
        data = path.read_bytes()
        assert data == data[:1] * size
        for left in tmp_path.glob(".slimnets-*"):
            cut_short += 1
            shutil.rmtree(left)
    assert cut_short > 5  # kills that came in the middle of a save
