"""The compiled engine where its cache cannot be written, and on processors of other kinds."""

import os
import platform
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
    assert str(package) in done.stdout and "'engine'" in done.stdout
    assert not list(tmp_path.rglob("*.nbi"))


NARROW = """
import torch
from torch import nn
from slimnets.acceleration import codes
from slimnets.acceleration.partition import annotate, cut
from slimnets.acceleration.nodes import Recorder
from slimnets.acceleration.trace import trace
torch.manual_seed(0)
assert not codes.WIDE
layers = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 40, 3, stride=2), nn.Flatten()
network = nn.Sequential(*layers, nn.Linear(40 * 49, 20)).eval()
with torch.no_grad():
    for batch in (1, 3, 16):
        x = torch.randn(batch, 3, 18, 18)
        graph = trace(network, 1)
        Recorder(graph).run(x)
        assert len(cut(graph, annotate(graph))) == 1
        torch.testing.assert_close(graph(x), network(x), rtol=1e-5, atol=1e-5)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="features of x86-64")
def test_without_wide_registers():
    narrow = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse,+sse2"}
    done = subprocess.run(
        [sys.executable, "-c", NARROW],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **narrow},
    )
    assert done.stdout == "equal\n", done.stderr
