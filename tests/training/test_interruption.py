"""Stopping by signal."""

import os
import signal
import threading

import pytest

from qlora_lite.foundation.errors import Interrupted
from qlora_lite.training.interruption import StopRequest, stop_on_signals


def test_the_first_signal_is_a_request_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as request:
        request.raise_if_requested("now")
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal_name == "SIGTERM"
        with pytest.raises(Interrupted, match="stopped by SIGTERM after step 3"):
            request.raise_if_requested("after step 3")
    assert signal.getsignal(signal.SIGTERM) is before


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
