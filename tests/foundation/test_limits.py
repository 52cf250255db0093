"""Code in data cannot run for hours, or fill the memory."""

import resource
import threading
import time

import pytest

from qlora_lite.foundation.limits import LimitReached, limited


def test_a_loop_is_stopped_and_the_limit_is_lifted_afterwards():
    before = resource.getrlimit(resource.RLIMIT_AS)
    start = time.monotonic()
    with pytest.raises(LimitReached, match=r"more than 0\.3 s"), limited(0.3, 2**30):
        while True:
            pass
    assert time.monotonic() - start < 5
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    time.sleep(0.5)  # nothing is raised later


def test_one_large_step_does_not_fill_the_memory():
    with pytest.raises(LimitReached, match="more than 64 MiB"), limited(10, 2**26):
        bytes(2**40)


def test_errors_of_the_block_pass():
    with pytest.raises(KeyError), limited(1, 2**30):
        raise KeyError("a")


def test_a_block_that_ends_in_time_is_not_disturbed():
    for _ in range(1000):
        with limited(0.25, 2**30):
            sum(range(100))
    time.sleep(0.5)


def test_it_works_in_other_threads():
    found = []

    def run() -> None:
        try:
            with limited(0.3, 2**30):
                while True:
                    pass
        except LimitReached:
            found.append("stopped")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=10)
    assert found == ["stopped"]
