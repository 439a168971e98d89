"""Every benchmark runs in its quick mode, checks what it computes, and writes its figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import run_script

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def quick(script: str, *arguments: object) -> str:
    return run_script(BENCHMARKS / script, "--quick", *arguments, MPLBACKEND="Agg")


def figures(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    assert {"torch", "slimnets", "processor"} <= set(found["machine"])
    return found


def test_file_size(tmp_path: Path) -> None:
    assert "slimnets.save, int8" in quick("file_size.py", "--out", tmp_path)
    found = figures(tmp_path / "file_size.json")
    assert {row["sparsity"] for row in found["results"]} == {0.5, 0.9}
    assert "| slimnets.save, int8 " in (tmp_path / "file_size.md").read_text()


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_training_cost(tmp_path: Path) -> None:
    assert "bytes per prunable weight" in quick("training_cost.py", "--out", tmp_path)
    compared = {row["what"] for row in figures(tmp_path / "training_cost.json")["rows"]}
    assert {"step under GradualPrune", "distillation step"} <= compared


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_speed(tmp_path: Path) -> None:
    assert "slimnets 90%" in quick("speed.py", "--out", tmp_path)
    names = {row["name"] for row in figures(tmp_path / "speed-tiny.json")["results"]}
    assert {"PyTorch eager", "slimnets 90%"} <= names
    assert (tmp_path / "speed-tiny.png").stat().st_size > 1000
