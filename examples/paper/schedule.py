"""Train many runs, some at the same time, each after those that it goes on with or learns from."""

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch
from networks import NETWORKS
from runs import Run
from settings import Settings
from train import result, seed_of

import slimnets

Job = tuple[Run, int, Settings]
"""A run, its seed, and how it is trained."""


def train_all(queue: list[Job], processes: int) -> None:
    """Train what is not finished, and say how long the rest will take.

    A run is expected to take as long as those of its network so far; of a network that there was
    none of yet, as long as their multiplications suggest.

    Raises:
        SystemExit: After all others, if some could not be trained.
    """
    left = [job for job in queue if not _is_finished(*job)]
    image = torch.zeros(1, 3, 32, 32)
    macs = {
        name: slimnets.summarize(NETWORKS[name](), image).total.macs
        for name in {run.network for run, _, _ in left}
    }
    spent: dict[str, list[float]] = {}
    failed: list[str] = []
    for (run, seed, settings), future in _done(left, processes):
        left.remove((run, seed, settings))
        if error := future.exception():
            failed.append(f"{run.name}, seed {seed}: {error!r}")
            print(f"failed: {failed[-1]}", flush=True)
            continue
        figures = future.result()
        spent.setdefault(run.network, []).append(figures["seconds"])
        mean = {name: sum(times) / len(times) for name, times in spent.items()}
        rate = sum(mean.values()) / sum(macs[name] for name in mean)
        rest = sum(mean.get(one.network, rate * macs[one.network]) for one, _, _ in left)
        print(
            f"{run.name}, seed {seed}: {figures['files']['float32']['accuracy']:.2%} after "
            f"{figures['epochs']:g} epochs; {len(left)} runs and about "
            f"{rest / 60 / processes:.0f} minutes left",
            flush=True,
        )
    if failed:
        waiting = [f"{run.name}, seed {seed}: begins with one of them" for run, seed, _ in left]
        raise SystemExit("\n".join(["not trained:", *failed, *waiting]))


def _done(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Future[dict[str, Any]]]]:
    """Train ``jobs`` in this order, as far as what they begin with is finished."""
    waiting, running = list(jobs), dict[Future[dict[str, Any]], Job]()
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a fork
    with ProcessPoolExecutor(processes, context, _set_up, (processes,)) as pool:
        while True:
            ready = [job for job in waiting if all(_is_finished(*one) for one in _before(*job))]
            for job in ready[: processes - len(running)]:
                waiting.remove(job)
                running[pool.submit(result, *job)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future


def _before(run: Run, seed: int, settings: Settings) -> list[Job]:
    return [(one, seed_of(one, seed), settings) for one in run.begins_with]


def _is_finished(run: Run, seed: int, settings: Settings) -> bool:
    return settings.path(run, seed).exists()


def _set_up(processes: int) -> None:
    """Of one of so many processes."""
    quiet()
    if processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def quiet() -> None:
    """No advice of Lightning's that is true of all these runs."""
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
