"""The benchmark script, in its quick form."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "speed.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    spec = spec_from_file_location("speed", SCRIPT)
    assert spec is not None and spec.loader is not None
    speed = module_from_spec(spec)
    spec.loader.exec_module(speed)
    speed.main(["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert {"PyTorch eager", "slimnets 90%"} <= {row["name"] for row in results}
    assert (tmp_path / "speed.png").stat().st_size > 1000
    assert "slimnets 90%" in capsys.readouterr().out
