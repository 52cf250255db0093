"""A command that a launcher started several times: torchrun, deepspeed, accelerate."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.processes import is_launched, joined

_LOCAL_RANK = re.compile(r"--local[_-]rank=\d+")


def without_local_rank(words: Sequence[str]) -> list[str]:
    """The words of a command without `--local_rank=N`, which deepspeed's launcher appends."""
    return [word for word in words if not _LOCAL_RANK.fullmatch(word)]


def require_one_process(words: Sequence[str]) -> None:
    """Check that a command other than `train` was not started several times.

    Raises:
        RecipeError: if it was.
    """
    if is_launched() and words and words[0] not in ("train", "--help", "-h"):
        raise RecipeError(
            f"got a launcher with {os.environ['WORLD_SIZE']} processes for `{words[0]}`, and only "
            f"`train` runs in several. Start `qlora-lite {words[0]}` without a launcher"
        )


@contextmanager
def one_of_several() -> Iterator[None]:
    """Join the other processes, if there are any. Only the main one prints, besides errors."""
    with joined() as processes:
        if not processes.is_main:
            sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
        yield
