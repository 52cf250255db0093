"""Prepare the process for a command: streams, signals and the warnings of libraries."""

import errno
import logging
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

from qlora_lite.foundation.errors import Interrupted


def prepare_process() -> None:
    """Write line by line; replace characters that the terminal cannot encode; survive a closed
    terminal; make SIGTERM and SIGHUP raise `Interrupted`; silence warnings that users cannot act
    on."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)  # for `| tee` and log files
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream.isatty() and not isinstance(stream, ClosableTerminal):
            setattr(sys, name, ClosableTerminal(stream))
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_interrupted)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` sets it
            signal.signal(signal.SIGHUP, _raise_interrupted)
    # bitsandbytes warns when an optional package for CPU inference is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # our own message reports once that the hub cannot be reached
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


class ClosableTerminal:
    """A terminal whose output is lost, not an error, after it was closed.

    The error comes before SIGHUP, and must not end a run before its state is saved.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError as error:
            return self._lost(error, len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error, 0)

    def _lost(self, error: OSError, length: int) -> int:
        if error.errno != errno.EIO:
            raise error
        return length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _raise_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM or SIGHUP outside of training, which installs its own handler."""
    raise Interrupted(f"stopped by {signal.Signals(number).name}. The same command continues")
