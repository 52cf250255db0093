"""Run measurements in subprocesses, several at a time.

A small model gains little from a second thread, so two parallel runs with one core each are faster
than two runs in sequence with both cores. Subprocesses are forks of this process, which must not
have computed anything with threads: a thread pool does not survive a fork.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch

from method_study.results import Task, Values
from qlora_lite.foundation.errors import QloraLiteError

POLL_SECONDS = 1.0

Outcome = tuple[Values, float]
"""The measured values, and the seconds that it took."""


def run_in_parallel(
    tasks: Sequence[Task], jobs: int, threads: int
) -> Iterator[tuple[Task, Values, float]]:
    """Yield each task with its values and seconds, in the order of completion.

    Args:
        jobs: number of parallel processes.
        threads: threads per process.

    Raises:
        QloraLiteError: from a measurement; the other processes are terminated.
    """
    context = get_context("fork")
    waiting = list(tasks)
    running: dict[Connection, tuple[Task, ForkProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                ours, theirs = context.Pipe(duplex=False)
                task = waiting.pop(0)
                process = context.Process(
                    target=_measure, args=(task, threads, theirs, os.getpid())
                )
                process.start()
                theirs.close()
                running[ours] = task, process
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                task, process = running[pipe]
                values, seconds = _received(pipe, task)
                process.join()
                del running[pipe]
                yield task, values, seconds
    finally:
        for _, process in running.values():
            process.terminate()


def _measure(task: Task, threads: int, pipe: Connection, parent: int) -> None:
    """In the subprocess: send the outcome or the error."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    start = time.perf_counter()
    outcome: Outcome | QloraLiteError
    try:
        values = task.measure()
        # `run_seconds` includes earlier, interrupted attempts
        outcome = values, max(time.perf_counter() - start, values.get("run_seconds", 0.0))
    except QloraLiteError as error:
        outcome = error
    pipe.send(outcome)


def _end_with(parent: int) -> None:
    """End this process when its parent has ended: a killed study leaves no runs behind."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _received(pipe: Connection, task: Task) -> Outcome:
    try:
        outcome = pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of '{task.key}' ended without a result") from None
    if isinstance(outcome, QloraLiteError):
        raise outcome
    return outcome
