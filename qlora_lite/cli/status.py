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

from qlora_lite.cli.terminal import prepare_process
from qlora_lite.foundation.console import errors, visible
from qlora_lite.foundation.errors import CheckError, DataError, Interrupted, QloraLiteError
from qlora_lite.foundation.interrupts import INTERRUPTED, is_ending, report
from qlora_lite.foundation.processes import PeerError, current

DONE, FAILED, BUG, MISTAKE = 0, 1, 1, 2

_LIMITS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP),
)
"""Errors of the operating system that the user can fix: permissions, space, paths."""

_PLEASE_REPORT = (
    "this is a bug in qlora-lite, not your mistake. Please report it with the lines above and the "
    "command"
)


def status_of(command: Callable[[], object]) -> int:
    """Run a command, print its error on stderr, and return its exit status. `SystemExit` passes."""
    prepare_process()
    try:
        command()
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        is_consequence = is_ending() and not isinstance(error, Interrupted)
        return _explain(KeyboardInterrupt() if is_consequence else error)
    return DONE


def _explain(error: BaseException) -> int:
    match error:
        case PeerError():
            return FAILED if not current().is_main else _failed_peer(error)
        case QloraLiteError():
            status, kind, message = MISTAKE, "error", str(error)
        case CheckError():
            status, kind, message = FAILED, "check failed", str(error)
        case OSError() if error.errno in _LIMITS:
            place = error.filename or "the disk"
            status, kind, message = MISTAKE, "error", f"{place}: {error.strerror}"
        case Interrupted() | KeyboardInterrupt():
            report(visible(str(error)))
            return INTERRUPTED
        case BrokenPipeError():
            # the reader closed the pipe (`| head`): not an error; drop what is not flushed yet
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        case _:
            sys.stderr.write(visible("".join(traceback.format_exception(error))))
            status, kind, message = BUG, "bug", _PLEASE_REPORT
    _say(message, kind)
    if isinstance(error, DataError):
        _show_sample(error)
    return status


def _show_sample(error: DataError) -> None:
    """Print the row that has no trained token, if the error carries one."""
    from qlora_lite.cli.rows import row_text
    from qlora_lite.data.tokenise import NothingTrained

    if isinstance(error, NothingTrained):
        errors.print(row_text(error.pieces, has_colour=errors.color_system is not None))


def _failed_peer(error: PeerError) -> int:
    """The main process reports a lost process too: one that was killed could not."""
    _say(f"{error}. The same command continues the run", "error")
    return FAILED


def _say(message: str, kind: str) -> None:
    """Print an error; of several processes with the same one, only one prints it."""
    processes = current()
    if not processes.publish(message):
        return
    where = "" if processes.is_main else f" in process {processes.rank}"
    errors.print(f"[bold red]{kind}{where}:[/]", end=" ")
    errors.print(message, markup=False, soft_wrap=True)
