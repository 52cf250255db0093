"""Send metrics to experiment trackers, through accelerate. By default there is no tracker."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.processes import Processes
from qlora_lite.recipe import Recipe

Track = Callable[[dict[str, Any], int], None]
"""(metrics, step)"""


def require_trackers(names: Sequence[str]) -> None:
    """Check that the trackers' packages are installed.

    Raises:
        RecipeError: naming the package that is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"tracking={list(names)}: the package {missing[0]} is not installed. Run "
            f"`pip install {missing[0]}`, or leave that tracker out"
        )


@contextmanager
def tracking(recipe: Recipe, directory: Path, processes: Processes) -> Iterator[Track]:
    """A function that sends metrics to the recipe's trackers while the block runs; only that of the
    main process sends."""
    if not recipe.tracking or not processes.is_main:
        yield lambda values, step: None
        return
    with _without_launcher():
        accelerator = Accelerator(cpu=True, log_with=list(recipe.tracking), project_dir=directory)
    accelerator.init_trackers(directory.name)
    try:
        yield lambda values, step: accelerator.log(values, step=step)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()  # `end_training` would also end the communication of the processes


@contextmanager
def _without_launcher() -> Iterator[None]:
    """Hide the variables of a launcher: with them accelerate sets up communication, DeepSpeed and
    the number of threads, in this process alone."""
    names = [n for n in os.environ if n.startswith("ACCELERATE_")]
    names += ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden
