"""Every benchmark runs in its quick mode, checks what it computes, and writes its figures."""

import json
import shutil
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


@pytest.mark.slow
def test_roofline(tmp_path: Path) -> None:
    assert "all of them" in quick("roofline.py", "--out", tmp_path)
    found = figures(tmp_path / "roofline.json")
    assert min(found["peak_gflops"], found["memory_bandwidth"]) > 0
    for run in found["runs"]:
        assert len(run["layers"]) == 19
        for layer in run["layers"]:
            assert layer["bound_by"] in ("compute", "memory")
            assert layer["gflops"] > 0
    layer = found["runs"][0]["layers"][3]  # 10 % of 16 x 16 x 3 x 3 weights, 256 pixels, batch 2
    assert layer["shape"] == "16 to 16 @ 16 x 16"
    assert layer["operations"] == pytest.approx(2 * 230 * 256 * 2, rel=0.1)
    assert (tmp_path / "roofline.png").stat().st_size > 1000


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_speed(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "speed-tiny.json"
    path.parent.mkdir()
    foreign = {"machine": {"processor": "another"}, "combinations": [{"threads": 1, "batch": 2}]}
    path.write_text(json.dumps(foreign))
    assert "slimnets, 90 %" in quick("speed.py", "--out", path.parent)
    found = figures(path)
    assert [part["batch"] for part in found["combinations"]] == [1, 2]
    for part in found["combinations"]:
        names = {row["name"] for row in part["rows"]}
        assert {"PyTorch eager", "torch.export", "slimnets, 90 %", "slimnets, factorized"} <= names
        assert {"torch.export, factorized", "slimnets, factorized, 90 %"} <= names
    assert path.with_suffix(".png").stat().st_size > 1000

    one, _ = found["combinations"]
    path.write_text(json.dumps({**found, "combinations": [one]}))  # as if it had been stopped
    assert "batch 1, 1 thread: kept" in quick("speed.py", "--out", path.parent)
    assert figures(path)["combinations"][0] == one
    assert len(figures(path)["combinations"]) == 2

    found["combinations"].append({**one, "threads": 2})  # as fast as one
    path.write_text(json.dumps(found))
    run_script(BENCHMARKS / "page.py", path.parent)
    page = (tmp_path / "benchmarks.md").read_text()
    threads = page.split("2 threads, times as fast as one:")[1].split("The factorized network")[0]
    assert threads.count("1.00x") == 5
    assert "| slimnets, factorized, 90 % " in threads


@pytest.mark.slow
def test_page_is_made_of_the_figures(tmp_path: Path) -> None:
    kept = BENCHMARKS.parents[1] / "docs" / "benchmarks"
    copied = tmp_path / "benchmarks"
    shutil.copytree(kept, copied)
    run_script(BENCHMARKS / "page.py", copied)
    assert copied.with_suffix(".md").read_text() == kept.with_suffix(".md").read_text()
