"""SIGINT, SIGTERM and SIGHUP stop a run between two steps, after its state is saved.

With several processes, a signal to one of them stops all, after the same step.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_lite.foundation.errors import Interrupted
from qlora_lite.foundation.interrupts import ALL_OF_THEM, signals_are_requests
from qlora_lite.foundation.processes import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SAVE_SECONDS = 25
"""How long one of several processes may take to save: torchrun kills it after 30 seconds, and if
another process is dead, saving may never end."""


class StopRequest:
    """Whether the run should stop, and because of which signal."""

    signal_name: str | None = None

    def agreed(self, processes: Processes) -> bool:
        """Whether the run should stop: a signal reached one of its processes, or the launcher of
        one is gone. Collective."""
        if self.signal_name is None and processes.is_orphan:
            self.signal_name = "the end of its launcher"
        should_stop = processes.any(self.signal_name is not None)
        if should_stop and self.signal_name is None:
            self.signal_name = "a signal to another process"
        return should_stop

    def raise_if_requested(self, when: str) -> None:
        """Raise if the run should stop. Call it where nothing would be lost.

        Raises:
            Interrupted: if a signal arrived.
        """
        if self.signal_name:
            raise Interrupted(
                f"stopped by {self.signal_name} {when}. The same command continues the run"
            )


@contextmanager
def stop_on_signals(processes: Processes | None = None) -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request. A second one has its usual effect.

    One of several processes ignores further signals, and ends after `SAVE_SECONDS`. A signal that
    is ignored, as `nohup` does with SIGHUP, stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {
        n: handler for n, handler in previous.items() if handler not in (None, signal.SIG_IGN)
    }

    is_one_of_several = processes is not None and processes.world > 1
    deadline = threading.Timer(SAVE_SECONDS, _end)
    deadline.daemon = True

    def handle(number: int, frame: FrameType | None) -> None:
        if is_one_of_several:
            if request.signal_name is None:
                deadline.start()
        else:
            for other, handler in previous.items():
                signal.signal(other, handler)
        request.signal_name = signal.Signals(number).name

    for number in previous:
        signal.signal(number, handle)
    try:
        with signals_are_requests(ALL_OF_THEM if is_one_of_several else 1):
            yield request
    finally:
        deadline.cancel()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end() -> None:
    os.write(2, f"error: the state was not saved within {SAVE_SECONDS} seconds\n".encode())
    os._exit(1)
