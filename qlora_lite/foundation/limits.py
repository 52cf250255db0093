"""Limits for code that comes with data, such as a chat template: time, and memory.

    with limited(seconds=5, num_bytes=2**30):
        text = render(template, messages)

A template is a program in a sandbox: it can do no harm, but loop for hours or build a text of
terabytes. A thread watches the time and raises `LimitReached` in the thread that runs the block,
between two steps of Python. The address space of the process is limited meanwhile, so that one
step cannot fill the memory.
"""

import ctypes
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WATCH_SECONDS = 0.2
"""How often the time is looked at."""


class LimitReached(Exception):
    """The block took too long, or needs too much memory."""


class _Watch:
    """Deadlines by thread, and the thread that watches them."""

    def __init__(self) -> None:
        self.deadlines: dict[int, float] = {}
        self.expired: set[int] = set()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.work = threading.Event()

    def start(self, seconds: float) -> None:
        with self.lock:
            self.deadlines[threading.get_ident()] = time.monotonic() + seconds
            if self.thread is None or not self.thread.is_alive():  # a fork has no threads
                self.thread = threading.Thread(target=self._run, name="limits", daemon=True)
                self.thread.start()
        self.work.set()

    def stop(self) -> bool:
        """Whether the time was over."""
        here = threading.get_ident()
        with self.lock:
            self.deadlines.pop(here, None)
            is_expired = here in self.expired
            self.expired.discard(here)
            if is_expired:
                _raise_in(here, None)  # in case it is still to come
        return is_expired

    def _run(self) -> None:
        while True:
            self.work.wait()
            time.sleep(WATCH_SECONDS)
            with self.lock:
                now = time.monotonic()
                for thread, deadline in list(self.deadlines.items()):
                    if now > deadline:
                        del self.deadlines[thread]
                        self.expired.add(thread)
                        _raise_in(thread, LimitReached)
                if not self.deadlines:
                    self.work.clear()


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread when it does its next step; None takes it back."""
    kind = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)


class _AddressSpace:
    """The limit of the process's address space, while at least one block runs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_blocks = 0
        self.before = (0, 0)
        self.size = 0
        self.measured = self.used = 0.0

    def limit(self, num_bytes: int) -> None:
        with self.lock:
            self.num_blocks += 1
            if self.num_blocks == 1:
                self.before = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
                allowed = self._measure() + num_bytes
                if soft == resource.RLIM_INFINITY or allowed < soft:
                    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))

    def release(self) -> None:
        with self.lock:
            self.num_blocks -= 1
            self.used = time.monotonic()
            if not self.num_blocks:
                resource.setrlimit(resource.RLIMIT_AS, self.before)

    def _measure(self) -> int:
        """Bytes in use. Reading them costs 20 us, so not again for each row of a data set: what was
        read is used for a second, if no other work was done in between."""
        now = time.monotonic()
        if now - self.measured > 1 or now - self.used > 0.01:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            self.measured, self.size = now, pages * resource.getpagesize()
        return self.size


_watch = _Watch()
_space = _AddressSpace()


@contextmanager
def limited(seconds: float, num_bytes: int) -> Iterator[None]:
    """Run the block with at most this time and about this much more memory.

    Raises:
        LimitReached: if one of them is not enough.
    """
    is_over = False
    _space.limit(num_bytes)
    try:
        _watch.start(seconds)
        try:
            yield
        finally:
            is_over = _watch.stop()
    except (MemoryError, OverflowError) as error:
        raise LimitReached(f"it needs more than {num_bytes >> 20} MiB") from error
    except LimitReached:
        is_over = True
        _watch.stop()  # the first one may be what was interrupted
    finally:
        _space.release()
    if is_over:
        raise LimitReached(f"it takes more than {seconds:g} s")
