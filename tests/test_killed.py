"""Training that is killed and resumed, again and again, ends as training that never was.

`SLIMNETS_KILLS=100 pytest -s tests/test_killed.py -m "slow or not slow"` kills a hundred times.
"""

import math
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from slimnets.resume import last_checkpoint
from tests.killed_training import METHODS, rows, train

CASES = [  # the slow ones are parts of the others
    pytest.param(method, every, marks=() if method == "averaged" else pytest.mark.slow)
    for method in METHODS
    for every in (None, 4)
]
KILLS = math.ceil(int(os.environ.get("SLIMNETS_KILLS", len(CASES))) / len(CASES))  # of each case
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.killed_training"])  # imported once, not in every process

pytestmark = pytest.mark.timeout(300 + 60 * KILLS)


def start(*arguments):
    process = PROCESSES.Process(target=train, args=arguments)
    process.start()
    return process


def whole_run(folder, *arguments):
    """Train without a kill, and return the seconds it took."""
    folder.mkdir()
    begin = time.monotonic()
    process = start(folder, *arguments)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begin


def wait_for_a_write(process, folder):
    """Return as soon as a checkpoint is begun, or the process has ended."""
    before = set(folder.glob("*.ckpt"))
    while process.is_alive() and set(folder.glob("*.ckpt")) == before:
        time.sleep(0.001)


def killed_run(folder, chance, seconds, kills, *arguments):
    """Train, killing at random moments up to ``kills`` times.

    Returns:
        How many kills met the training, and how many of them a checkpoint half written.
    """
    folder.mkdir()
    met = cut = 0
    while not (folder / "result.pt").exists():
        process = start(folder, *arguments)
        if met < kills:
            if chance.random() < 0.5:
                process.join(chance.uniform(0.1, 1) * seconds)
            for _ in range(chance.choice([0, 1, 2])):
                wait_for_a_write(process, folder)
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        met += process.exitcode == -signal.SIGKILL
        newest = max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)
        cut += process.exitcode != 0 and newest != last_checkpoint(folder)
    return met, cut


def assert_same(one, two, name="result"):
    assert type(one) is type(two), name
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), name
    elif isinstance(one, dict):
        assert list(one) == list(two), name
        for key in one:
            assert_same(one[key], two[key], f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), name
        for index, pair in enumerate(zip(one, two, strict=True)):
            assert_same(*pair, f"{name}.{index}")
    else:
        assert one == two, name


def assert_same_curves(whole, killed, every):
    """A resumed run says once more how sparse the network is; else every step is the same."""
    assert whole.keys() == killed.keys()
    for name, curve in whole.items():
        # a kill may come after a checkpoint and before the row of the same batch
        lost = curve.keys() - killed[name].keys()
        assert all(every and (step + 1) % every == 0 for step in lost), (name, lost)
        value = None
        for step in sorted(killed[name]):
            value = curve.get(step, value)
            assert killed[name][step] == value, (name, step)


@pytest.mark.parametrize(("method", "every"), CASES)
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path, method, every):
    seconds = whole_run(tmp_path / "whole", method, every)
    expected = torch.load(tmp_path / "whole/result.pt")
    chance = random.Random(f"{method} {every}")
    kills = cuts = 0
    while kills < KILLS:
        folder = tmp_path / str(kills)
        met, cut = killed_run(folder, chance, seconds, min(5, KILLS - kills), method, every)
        kills, cuts = kills + met, cuts + cut
        if met:
            assert_same(expected, torch.load(folder / "result.pt"))
            assert_same_curves(rows(tmp_path / "whole"), rows(folder), every)
        else:  # it was faster than the kill
            folder.rename(tmp_path / f"{kills} missed {time.monotonic_ns()}")
    print(f"{method}, checkpoints every {every or 'epoch'}: {kills} kills, {cuts} while saving")
