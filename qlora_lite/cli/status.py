"""How a command ends: turn errors into messages and exit statuses, in this one place.

| status | meaning                                                                          |
|--------|----------------------------------------------------------------------------------|
| 0      | done                                                                             |
| 1      | a result failed its check: one message; or a bug in qlora-lite: traceback        |
| 2      | the user's mistake, or a limit of the machine: one message, no traceback         |
| 130    | interrupted; the training state, if any, is saved                                |
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from qlora_lite.cli.several import is_reported_by_launcher
from qlora_lite.cli.terminal import prepare_process
from qlora_lite.foundation.console import errors, visible
from qlora_lite.foundation.errors import CheckError, DataError, Interrupted, QloraLiteError
from qlora_lite.foundation.interrupts import INTERRUPTED, ignore_signals, is_ending, report
from qlora_lite.foundation.processes import PeerError, current, is_lost_peer

DONE, FAILED, BUG, MISTAKE = 0, 1, 1, 2

_LIMITS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP),
)
"""Errors of the operating system that the user can fix: permissions, space, paths."""

_SECONDS_AFTER_A_SIGNAL = 0.4
"""How long an interrupted process waits for others: less than `interrupts.GRACE_SECONDS`."""

_PLEASE_REPORT = (
    "this is a bug in qlora-lite, not your mistake. Please report it with the lines above and the "
    "command"
)


def status_of(command: Callable[[], object]) -> int:
    """Run a command, print its error on stderr, and return its exit status."""
    prepare_process()
    try:
        command()
    except SystemExit as end:  # how typer ends
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        is_consequence = is_ending() and not isinstance(error, Interrupted)
        return _explain(KeyboardInterrupt() if is_consequence else error)
    return DONE


def _explain(error: BaseException) -> int:
    if isinstance(error, PeerError) or is_lost_peer(error):
        return _end_with_another_process()
    details = ""
    match error:
        case QloraLiteError():
            status, kind, message = MISTAKE, "error", str(error)
        case CheckError():
            status, kind, message = FAILED, "check failed", str(error)
        case OSError() if error.errno in _LIMITS:
            place = error.filename or "the disk"
            status, kind, message = MISTAKE, "error", f"{place}: {error.strerror}"
        case Interrupted() | KeyboardInterrupt():
            message = visible(str(error))
            report(message)
            current().publish(INTERRUPTED, message)
            current().let_others_read(_SECONDS_AFTER_A_SIGNAL)
            return INTERRUPTED
        case BrokenPipeError():
            # the reader closed the pipe (`| head`): not an error; drop what is not flushed yet
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        case _:
            status, kind, message = BUG, "bug", _PLEASE_REPORT
            details = visible("".join(traceback.format_exception(error)))
    _say(message, kind, status, details)
    if isinstance(error, DataError):
        _show_sample(error)
    return status


def _show_sample(error: DataError) -> None:
    """Print the row that has no trained token, if the error carries one."""
    from qlora_lite.cli.rows import row_text
    from qlora_lite.data.tokenise import NothingTrained

    if isinstance(error, NothingTrained):
        errors.print(row_text(error.pieces, has_colour=errors.color_system is not None))


def _end_with_another_process() -> int:
    """End with the status of the process that failed first, which prints its error if it can."""
    ignore_signals()  # of a launcher that ends the rest
    processes = current()
    failure = processes.failure_of_another()
    if failure is not None:
        if failure.status == INTERRUPTED and processes.is_main:
            report(failure.message)  # the other one prints nothing about signals
        return failure.status
    lost = processes.lost()
    if lost is not None and not is_reported_by_launcher():
        which = ", ".join(f"process {rank} is gone" for rank in lost)
        which = which or "the connection to another process was lost"
        _say(f"{which}. The same command continues the run", "error", FAILED)
    return FAILED


def _say(message: str, kind: str, status: int, details: str = "") -> None:
    """Print an error; of several processes with the same one, only the main one prints it."""
    processes = current()
    text = details + message
    processes.publish(status, text)
    if processes.is_printed_by_main(text):
        return
    sys.stderr.write(details)
    where = "" if processes.is_main else f" in process {processes.rank}"
    errors.print(f"[bold red]{kind}{where}:[/]", end=" ")
    errors.print(message, markup=False, soft_wrap=True)
