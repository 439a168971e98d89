"""The compiled engine where its cache cannot be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import slimnets

pytest.importorskip("numba", reason="the engine is compiled by numba")

SCRIPT = """
import torch
from torch import nn
from slimnets.acceleration import accelerate, engine
torch.manual_seed(0)
torch.set_num_threads(1)
layers = [nn.Conv2d(32, 32, 3, padding=1) for _ in range(3)]
with torch.no_grad():
    for layer in layers:
        layer.weight.mul_(torch.rand_like(layer.weight) > 0.97)
    network, x = nn.Sequential(*layers).eval(), torch.randn(4, 32, 32, 32)
    fast = accelerate(network, x)
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-4)
print(engine.__file__)
print(sorted(fast.report.tried))
"""


@pytest.mark.slow
def test_without_a_place_for_the_cache(tmp_path):
    package, blocked = tmp_path / "slimnets", tmp_path / "blocked"
    source = Path(slimnets.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (package / "acceleration" / "__pycache__", blocked):
        file.touch()  # a file where a directory should be stops root as well
    nowhere = {name: str(blocked / "cache") for name in ("XDG_CACHE_HOME", "HOME")}
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-B", "-c", SCRIPT]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert str(package) in done.stdout and "'sparse'" in done.stdout
    assert not list(tmp_path.rglob("*.nbi"))
