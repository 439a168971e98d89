"""The rooms import each other one way only, and say what they export."""

import ast
from pathlib import Path

import pytest

import slimnets

SOURCE = Path(slimnets.__file__).parent

# what a room may know of besides itself; the public names of the package know everything
MAY_KNOW: dict[str, set[str]] = {
    "arguments": set(),
    "files": set(),
    "generators": set(),
    "inputs": set(),
    "layers": set(),
    "selectors": {"layers"},
    "text": set(),
    "trainer": {"layers"},
    "resume": {"generators", "trainer"},
    "gate": {"trainer"},
    "pruning": {"arguments", "layers", "selectors", "trainer", "inspection", "lowrank.modules"},
    "lowrank": {"arguments", "layers", "selectors", "trainer", "inspection", "text"},
    "distillation": {"arguments", "layers", "trainer", "lowrank.follow"},
    "artifact": {"files", "layers", "lowrank.modules"},
    "inspection": {
        "generators",
        "inputs",
        "layers",
        "trainer",
        "lowrank.modules",
        "artifact",
        "text",
    },
    "acceleration": {
        "files",
        "generators",
        "inputs",
        "layers",
        "lowrank.modules",
        "lowrank.factorize",
        "text",
    },
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: an import relative to its place is not seen here"
            # of the package itself, what is imported may be a room
            names = {f"slimnets.{alias.name}" for alias in node.names}
            found |= names if node.module == "slimnets" else {node.module}
        elif isinstance(node, ast.Import):
            found |= {
                f"{alias.name}." if alias.name == "slimnets" else alias.name for alias in node.names
            }
    return {name.removeprefix("slimnets.") for name in found if name.startswith("slimnets.")}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    allowed = {room(path), *MAY_KNOW[room(path)]}
    unknown = {
        name
        for name in imports(path)
        if not any(name == one or name.startswith(one + ".") for one in allowed)
    }
    assert not unknown, f"{path.name} imports {unknown}"


@pytest.mark.parametrize(
    "file",
    [
        "pruning/schedules.py",
        "pruning/criteria.py",
        "pruning/masks.py",
        "pruning/span.py",
        "lowrank/decompose.py",
        "distillation/losses.py",
        "artifact/streams.py",
        "artifact/codec.py",
    ],
)
def test_the_functions_at_the_bottom_know_no_room_and_no_trainer(file):
    text = (SOURCE / file).read_text()
    others = {name for name in imports(SOURCE / file) if not name.startswith(room(SOURCE / file))}
    assert others <= {"arguments", "layers"}
    assert "lightning" not in text.replace("Lightning", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_callbacks_do_not_know_each_other(path):
    if path.name == "callback.py":
        assert not {
            name for name in imports(path) if name.endswith((".callback", "distillation.module"))
        }


def test_everything_exported_is_there():
    for name in slimnets.__all__:
        assert getattr(slimnets, name).__doc__
