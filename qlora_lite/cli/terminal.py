"""Prepare the process for a command: streams, SIGTERM and the warnings of libraries."""

import logging
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

from qlora_lite.foundation.errors import Interrupted


def prepare_process() -> None:
    """Replace characters that the terminal cannot encode; make SIGTERM raise `Interrupted`;
    silence warnings that users cannot act on."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_interrupted)
    # bitsandbytes warns when an optional package for CPU inference is missing
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # our own message reports once that the hub cannot be reached
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def _raise_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM outside of training, which installs its own handler."""
    raise Interrupted("stopped by SIGTERM. The same command continues")
