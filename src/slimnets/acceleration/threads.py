"""Threads that run the engine together: one call of theirs at a time, else none are lent."""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from time import sleep

Job = Callable[[int], None]


class _Team:
    """Idle threads, waiting for a job each."""

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.queues: list[SimpleQueue[tuple[Job, int]]] = []
        self.process = os.getpid()

    def lend(self, count: int) -> None:
        """Have at least ``count`` threads."""
        while len(self.queues) < count:
            queue: SimpleQueue[tuple[Job, int]] = SimpleQueue()
            threading.Thread(target=_serve, args=(queue,), daemon=True).start()
            self.queues.append(queue)


def _serve(queue: "SimpleQueue[tuple[Job, int]]") -> None:
    while True:
        job, number = queue.get()
        job(number)


_team = _Team()


def together(
    job: Callable[[int, int], None], threads: int, stop: Callable[[], object] = lambda: None
) -> None:
    """Call ``job(thread, threads)`` in every thread at once, this one among them.

    The jobs may wait for each other. If the team works for somebody else now, this thread does
    the job alone: two half-started jobs would wait for each other for ever.

    When a thread fails, or this one is interrupted, ``stop`` is called: it has the other jobs end
    soon. They are waited for in any case, since they hold addresses of what the caller frees.
    """
    global _team
    if _team.process != os.getpid():  # a fork copies no threads
        _team = _Team()
    team = _team
    if threads < 2 or not team.busy.acquire(blocking=False):
        job(0, 1)
        return
    try:
        _share(team, job, threads, stop)
    finally:
        team.busy.release()


def _share(
    team: _Team, job: Callable[[int, int], None], threads: int, stop: Callable[[], object]
) -> None:
    done = threading.Semaphore(0)
    begun: list[int] = []
    ended: list[int] = []
    failures: list[BaseException] = []
    cancelled = threading.Event()

    def run(number: int) -> None:
        begun.append(number)
        try:
            if not cancelled.is_set():
                job(number, threads)
        except BaseException as failure:  # raised in the thread that called
            failures.append(failure)
            stop()
        finally:
            ended.append(number)
            done.release()

    try:
        team.lend(threads - 1)
        for number, queue in enumerate(team.queues[: threads - 1]):
            queue.put((run, number + 1))
        job(0, threads)
        for _ in range(threads - 1):
            done.acquire()
    except BaseException:
        cancelled.set()
        stop()
        while len(ended) < len(begun):
            with suppress(BaseException):  # a second interruption must not end the wait
                sleep(0.001)
        raise
    if failures:
        raise failures[0]
