"""Stopping by signal."""

import os
import signal
import threading

import pytest

from qlora_lite.foundation.errors import Interrupted
from qlora_lite.training.interruption import SIGNALS, StopRequest, stop_on_signals


@pytest.fixture(autouse=True)
def _usual_handlers():
    """As in a terminal, also if these tests run in the background or under nohup."""
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_first_signal_is_a_request_and_handlers_are_restored(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stop_on_signals() as request:
        request.raise_if_requested("now")
        os.kill(os.getpid(), number)
        assert request.signal_name == name
        with pytest.raises(Interrupted, match=f"stopped by {name} after step 3"):
            request.raise_if_requested("after step 3")
    assert signal.getsignal(number) is before


def test_handlers_are_restored_without_a_signal():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_on_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal_name is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_has_its_usual_effect():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal_name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def work():
        with stop_on_signals() as request:
            found.append((request, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    ((request, handler),) = found
    assert isinstance(request, StopRequest)
    assert handler is before
