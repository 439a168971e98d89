"""Train many runs, some at the same time, each after those that it goes on with or learns from."""

import logging
import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from networks import NETWORKS
from runs import REFERENCE, Run
from settings import Settings
from train import result, seed_of

import slimnets

Job = tuple[Run, int, Settings]
"""A run, its seed, and how it is trained."""

Done = Future[dict[str, Any]]


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
    for (run, seed, settings), done in _done(left, processes):
        left.remove((run, seed, settings))
        if error := done.exception():
            traceback.print_exception(error)
            failed.append(f"{run.name}, seed {seed}: {error!r}")
            print(f"failed: {failed[-1]}", flush=True)
            continue
        figures = done.result()
        if run != REFERENCE:  # which has epochs of its own, or none
            spent.setdefault(run.network, []).append(figures["seconds"])
        print(
            f"{run.name}, seed {seed}: {figures['files']['float32']['accuracy']:.2%} after "
            f"{figures['epochs']:g} epochs; {len(left)} runs"
            f"{_time_for(left, spent, macs, processes)} left",
            flush=True,
        )
    if left or failed:
        waiting = [f"{run.name}, seed {seed}: begins with one of them" for run, seed, _ in left]
        raise SystemExit("\n".join(["not trained:", *failed, *waiting]))


def _time_for(
    jobs: list[Job], spent: dict[str, list[float]], macs: dict[str, int], processes: int
) -> str:
    if not spent:
        return ""
    mean = {name: sum(times) / len(times) for name, times in spent.items()}
    rate = sum(mean.values()) / sum(macs[name] for name in mean)
    seconds = sum(mean.get(run.network, rate * macs[run.network]) for run, _, _ in jobs)
    return f" and about {seconds / 60 / processes:.0f} minutes"


def _done(jobs: list[Job], processes: int) -> Iterator[tuple[Job, Done]]:
    """Train ``jobs`` in this order, as far as what they begin with is finished."""
    waiting, running = list(jobs), dict[Done, tuple[Job, ProcessPoolExecutor]]()
    free = [_process(processes) for _ in range(processes)]
    while True:
        ready = [job for job in waiting if all(_is_finished(*one) for one in _before(*job))]
        for job in ready[: len(free)]:
            waiting.remove(job)
            process = free.pop()
            running[process.submit(result, *job)] = job, process
        if not running:
            break
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            job, process = running.pop(done)
            was_killed = isinstance(done.exception(), BrokenProcessPool)
            free.append(_process(processes) if was_killed else process)
            yield job, done
    for process in free:
        process.shutdown()


def _process(processes: int) -> ProcessPoolExecutor:
    """One of so many, which goes on from run to run with the images that it has decoded.

    Each is a pool of its own, as a pool of several ends with one that is killed.
    """
    context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a fork
    threads = max(1, torch.get_num_threads() // processes)
    return ProcessPoolExecutor(1, context, _begin, (threads,))


def _before(run: Run, seed: int, settings: Settings) -> list[Job]:
    return [(one, seed_of(one, seed), settings) for one in run.begins_with]


def _is_finished(run: Run, seed: int, settings: Settings) -> bool:
    return settings.path(run, seed).exists()


def _begin(threads: int) -> None:
    """Set up a process of so many threads."""
    quiet()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process whose parent was killed would go on, and those of the next try beside it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def quiet() -> None:
    """No advice of Lightning's that is true of all these runs."""
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", ".*does not have many workers")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
