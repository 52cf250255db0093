"""A command in several processes: started here, or by torchrun, deepspeed or accelerate."""

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.interrupts import (
    ALL_OF_THEM,
    INTERRUPTED,
    leave_reports_to_another_process,
    signals_are_requests,
)
from qlora_lite.foundation.processes import is_launched, joined

SHUTDOWN_SECONDS = 30
"""How long the processes have to save after a signal."""

_RUN_ID = "qlora-lite"

_LOCAL_RANK = re.compile(r"--local[_-]rank=\d+")


def without_local_rank(words: Sequence[str]) -> list[str]:
    """The words of a command without `--local_rank=N`, which deepspeed's launcher appends."""
    return [word for word in words if not _LOCAL_RANK.fullmatch(word)]


def require_one_process(words: Sequence[str]) -> None:
    """Check that a command other than `train` was not started several times.

    Raises:
        RecipeError: if it was.
    """
    if is_launched() and words and words[0] not in ("train", "--help", "-h"):
        raise RecipeError(
            f"got a launcher with {os.environ['WORLD_SIZE']} processes for `{words[0]}`, and only "
            f"`train` runs in several. Start `qlora-lite {words[0]}` without a launcher"
        )


@contextmanager
def one_of_several() -> Iterator[None]:
    """Join the other processes, if there are any. Only the main one prints, besides errors."""
    with joined() as processes, ExitStack() as stack:
        if not processes.is_main:
            sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            stack.enter_context(redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        yield


def is_reported_by_launcher() -> bool:
    """Whether `start_processes` started this one: it reports processes that were killed."""
    return os.environ.get("TORCHELASTIC_RUN_ID") == _RUN_ID


def start_processes(count: int, command: Sequence[str]) -> int:
    """Run a command in `count` processes on this machine, and return its exit status: that of the
    first process that failed.

    Ctrl-C and SIGTERM reach every process, which then have time to save.

    Raises:
        RecipeError: if a launcher started this process.
    """
    if is_launched():
        raise RecipeError(
            f"got --processes {count} under a launcher, which starts the processes itself. "
            "Use one of the two"
        )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the processes report
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=_RUN_ID,
        max_restarts=0,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    leave_reports_to_another_process()
    try:
        with signals_are_requests(ALL_OF_THEM):
            elastic_launch(config, sys.executable)(*command)
    except SignalException:
        return INTERRUPTED
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        ended_by = signal.Signals(-failure.exitcode).name
        sys.stderr.write(
            f"error: process {rank} was ended by {ended_by}. The same command continues the run\n"
        )
        return 1
    return 0
