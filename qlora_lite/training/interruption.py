"""SIGINT and SIGTERM end a run between two steps, with its state saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_lite.foundation.errors import Interrupted


class StopRequest:
    """Whether somebody asked the run to stop, and with which signal."""

    signal_name: str | None = None

    def raise_if_requested(self, when: str) -> None:
        """Called where nothing would be lost.

        Raises:
            Interrupted: if a signal has come.
        """
        if self.signal_name:
            raise Interrupted(f"stopped by {self.signal_name} {when}. The same command continues")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as it always did."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def heard(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        for other, handler in previous.items():
            signal.signal(other, handler)

    for number in previous:
        signal.signal(number, heard)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
