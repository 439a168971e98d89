"""The table of file sizes, in its quick mode, which checks bits and byte counts."""

import json
import logging
import runpy
from pathlib import Path

import pytest


def test_file_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(__file__).parents[2] / "examples" / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "level", logger.level)
    main = runpy.run_path(str(folder / "file_size.py"))["main"]
    main(["--quick", "--json", str(tmp_path / "figures.json")])
    assert "slimnets.save, int8" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["sparsity"] for row in figures["results"]} == {0.5, 0.9}
