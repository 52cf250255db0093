"""Ctrl-C and SIGTERM end a command within a second and with one line, whatever it is doing.

    status = interruptible(lambda: run(arguments))

Ctrl-C raises KeyboardInterrupt in the main thread, which cleans up. Python does that between two
operations only, and an operation may take long: a backward pass, a batch of rows in the tokenizer.
So a second thread reads the signals as they arrive, and ends the process if it is still there after
`GRACE_SECONDS`. That loses nothing: files and folders are renamed when they are complete.

While `signals_are_requests` is active, signals are left to the code inside: the first one, or all
of them in a process that a launcher started. Such a process gets Ctrl-C twice, from the terminal
and from the launcher, and it is the launcher that ends it if it takes too long.

Only imports that take milliseconds are allowed here: Ctrl-C may come while the others are loading.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

GRACE_SECONDS = 0.6
ACKNOWLEDGED = b"\nstopping after this step"
HOW_TO_STOP_NOW = b". Press Ctrl-C or send the signal again to stop now"
ALL_OF_THEM = 10**9
INTERRUPTED = 130

_STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@dataclass
class _State:
    requests: int = 0
    """Signals that the running code will handle by itself."""
    is_ending: bool = False
    """A signal to stop arrived, and it was not a request."""
    cause: str = "stopped from the keyboard"
    is_reported: bool = False
    """The line about it is printed."""
    is_quiet: bool = False
    """Another process of the run prints it."""


_state = _State()
_reporting = threading.Lock()


def is_ending() -> bool:
    """Whether a signal to stop arrived: any exception after it is a consequence of it."""
    return _state.is_ending


def leave_reports_to_another_process() -> None:
    """Print nothing about signals in this process."""
    _state.is_quiet = True


def report(message: str = "") -> None:
    """Print how the command was interrupted, unless that was printed before."""
    with _reporting:
        if not _state.is_reported and not _state.is_quiet:
            sys.stderr.write(f"interrupted: {message or _state.cause}\n")
            sys.stderr.flush()
            _state.is_reported = True


def ignore_signals() -> None:
    """Ignore signals to stop: the process is ending by itself."""
    _state.requests = ALL_OF_THEM - 1  # without an answer
    if threading.current_thread() is threading.main_thread():
        for number in _STOPPING:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_are_requests(number: int = 1) -> Iterator[None]:
    """So many signals to stop are handled by the code inside; the next one ends the process."""
    _state.requests = number
    try:
        yield
    finally:
        _state.requests = 0


def interruptible(run: Callable[[], int], is_quiet: bool = False) -> int:
    """Run a command, and return its exit status: 130 after Ctrl-C.

    Args:
        is_quiet: print nothing about signals; another process of the run does.
    """
    _state.is_quiet = is_quiet
    if threading.current_thread() is not threading.main_thread():
        return run()
    with _watched():
        try:
            status = run()
        except BaseException:  # SystemExit too: typer makes it out of KeyboardInterrupt
            if not is_ending():
                raise
        if not is_ending():
            return status
        report()
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(INTERRUPTED)  # to unload torch and all modules takes seconds


@contextmanager
def _watched() -> Iterator[None]:
    _state.requests, _state.is_ending, _state.is_reported = 0, False, False
    _state.cause = _State.cause
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.signal(signal.SIGINT, _raise)
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = _silent_while_ending(hooks[0])
    sys.excepthook = _silent_while_ending(hooks[1])
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_writer)
        signal.signal(signal.SIGINT, previous)
        sys.unraisablehook, sys.excepthook = hooks
        os.close(writer)  # ends the thread


def _raise(number: int, frame: FrameType | None) -> None:
    if not _state.is_ending:  # what the first one started ends soon
        _state.is_ending = True
        raise KeyboardInterrupt


def _silent_while_ending(hook: Callable[..., object]) -> Callable[..., None]:
    """A hook that prints no traceback of what Ctrl-C interrupted, such as a destructor."""

    def print_unless_ending(*arguments: object) -> None:
        if not _state.is_ending:
            hook(*arguments)

    return print_unless_ending


def _watch(reader: int) -> None:
    """Read the numbers of signals as they arrive."""
    with open(reader, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            for number in numbers:
                if number == signal.SIGHUP:
                    detach_from_terminal()
                if number not in _STOPPING:
                    continue
                if _state.requests:
                    is_first = _state.requests in (1, ALL_OF_THEM)
                    _state.requests -= 1
                    if is_first and number != signal.SIGHUP and not _state.is_quiet:
                        how = HOW_TO_STOP_NOW if not _state.requests else b""
                        os.write(2, ACKNOWLEDGED + how + b"\n")
                else:
                    # an import can swallow the exception that the main thread raises for it
                    if number != signal.SIGINT:
                        _state.cause = f"stopped by {signal.Signals(number).name}"
                        _state.is_ending = True
                    time.sleep(GRACE_SECONDS)
                    _end_now()


def _end_now() -> NoReturn:
    if _reporting.acquire(timeout=0.2) and not (_state.is_reported or _state.is_quiet):
        show_cursor = "\r\n\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{show_cursor}interrupted: {_state.cause}\n".encode())
    os._exit(INTERRUPTED)


def detach_from_terminal() -> None:
    """Send output that would go to a closed terminal nowhere: writing to it is an error."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        try:
            is_terminal = os.isatty(number) or _is_closed_terminal(number)
        except OSError:
            continue
        if is_terminal:
            os.dup2(nowhere, number)
    os.close(nowhere)


def _is_closed_terminal(number: int) -> bool:
    """`isatty` is False after the terminal was closed, but its name is still there."""
    return os.readlink(f"/proc/self/fd/{number}").startswith(("/dev/pts/", "/dev/tty"))
