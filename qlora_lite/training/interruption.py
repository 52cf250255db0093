"""SIGINT, SIGTERM and SIGHUP stop a run between two steps, after its state is saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_lite.foundation.errors import Interrupted
from qlora_lite.foundation.interrupts import first_is_a_request
from qlora_lite.foundation.processes import Processes

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request. A second one has its usual effect.

    A signal that is ignored, as `nohup` does with SIGHUP, stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {
        n: handler for n, handler in previous.items() if handler not in (None, signal.SIG_IGN)
    }

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        for other, handler in previous.items():
            signal.signal(other, handler)

    for number in previous:
        signal.signal(number, handle)
    try:
        with first_is_a_request():
            yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
