"""The process of a command: unencodable characters and SIGTERM."""

import io
import os
import signal
import sys

import pytest

from qlora_lite.cli.terminal import prepare_process
from qlora_lite.foundation.errors import Interrupted


@pytest.fixture
def restored_sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_characters_that_the_terminal_cannot_encode_become_question_marks(
    monkeypatch, restored_sigterm
):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    prepare_process()
    print("loss ▁▂█ 1.5", flush=True)
    assert raw.getvalue() == b"loss ??? 1.5\n"


def test_sigterm_outside_of_training_is_an_interruption(restored_sigterm):
    prepare_process()
    with pytest.raises(Interrupted, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
