"""Measurements in processes of their own, several at a time.

A small model gains little from a second thread, so two runs side by side, each on one core, are
done sooner than one after the other on both. A process is a fork of this one, which must not have
computed anything itself: threads of a pool do not survive a fork.
"""

import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch

from method_study.results import Task, Values
from qlora_lite.foundation.errors import QloraLiteError

Outcome = tuple[Values, float]
"""What was measured, and the seconds that it took."""


def side_by_side(
    tasks: Sequence[Task], jobs: int, threads: int
) -> Iterator[tuple[Task, Values, float]]:
    """Each task with what it measured and its seconds, in the order in which they end.

    Args:
        jobs: processes at a time.
        threads: of each.

    Raises:
        QloraLiteError: that of a measurement; the others are ended.
    """
    context = get_context("fork")
    waiting = list(tasks)
    running: dict[Connection, tuple[Task, ForkProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                ours, theirs = context.Pipe(duplex=False)
                task = waiting.pop(0)
                process = context.Process(target=_carry_out, args=(task, threads, theirs))
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


def _carry_out(task: Task, threads: int, pipe: Connection) -> None:
    """In the process: send what was measured, or why not."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    outcome: Outcome | QloraLiteError
    try:
        values = task.measure()
        # what an earlier attempt at a run has spent counts
        outcome = values, max(time.perf_counter() - began, values.get("run_seconds", 0.0))
    except QloraLiteError as error:
        outcome = error
    pipe.send(outcome)


def _received(pipe: Connection, task: Task) -> Outcome:
    try:
        outcome = pipe.recv()
    except EOFError:
        raise RuntimeError(f"the process of '{task.key}' ended without a result") from None
    if isinstance(outcome, QloraLiteError):
        raise outcome
    return outcome
