"""How a command ends: the one place that turns errors into messages and exit statuses.

| status | meaning                                                                   |
|--------|---------------------------------------------------------------------------|
| 0      | done                                                                      |
| 1      | our bug: traceback, and a line that asks to report it                     |
| 2      | the user's mistake, or a limit of the machine: one message, no traceback  |
| 130    | interrupted; where there was a state, it is saved                         |
"""

import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from qlora_lite.foundation.console import errors
from qlora_lite.foundation.errors import DataError, Interrupted, QloraLiteError

DONE, BUG, MISTAKE, INTERRUPTED = 0, 1, 2, 130

_LIMITS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP),
)
"""Errors of the operating system that only the user can do something about."""

_PLEASE_REPORT = (
    "this is a mistake in qlora-lite, not one of yours. Please report it with the lines above and "
    "the command"
)


def status_of(command: Callable[[], object]) -> int:
    """Carry out a command; say what went wrong on stderr. A `SystemExit` of its own passes."""
    _prepare_terminal()
    try:
        command()
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        return _explain(error)
    return DONE


def _explain(error: BaseException) -> int:
    match error:
        case QloraLiteError():
            status, kind, message = MISTAKE, "error", str(error)
        case OSError() if error.errno in _LIMITS:
            place = error.filename or "the disk"
            status, kind, message = MISTAKE, "error", f"{place}: {error.strerror}"
        case Interrupted():
            status, kind, message = INTERRUPTED, "interrupted", str(error)
        case BrokenPipeError():
            # whoever read the output has seen enough; nothing is left to be flushed to them
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        case KeyboardInterrupt():
            status, kind, message = INTERRUPTED, "interrupted", "stopped from the keyboard"
        case _:
            traceback.print_exception(error)
            status, kind, message = BUG, "bug", _PLEASE_REPORT
    _say(message, kind)
    if isinstance(error, DataError):
        _show_sample(error)
    return status


def _show_sample(error: DataError) -> None:
    """The tokens of a row in which nothing is trained."""
    from qlora_lite.cli.rows import row_text
    from qlora_lite.data.tokenise import NothingTrained

    if isinstance(error, NothingTrained):
        errors.print(row_text(error.sample, has_colour=errors.color_system is not None))


def _say(message: str, kind: str) -> None:
    errors.print(f"[bold red]{kind}:[/]", end=" ")
    errors.print(message, markup=False, soft_wrap=True)


def _prepare_terminal() -> None:
    """A character that the terminal lacks is a question mark; what no user can mend is not said."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    # bitsandbytes looks for an optional package for inference on CPU, and warns if it is not there
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # what a hub that cannot be reached means is said once, by our own message
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM outside of training, which listens for itself."""
    raise Interrupted("stopped by SIGTERM. The same command continues")
