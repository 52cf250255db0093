"""Checkpoints that are complete or absent.

    checkpoints/step-000200/
        adapter.safetensors     the adapter's tensors, in their storage dtypes
        optimizer.safetensors   fp32 copies, Adam's moments, the method's tensors
        state.json              progress, numbers of engine and method, what the run trains on, and
                                the hashes of all files
    checkpoints/best/           the adapter with the best held-out loss, if early stopping is on

A checkpoint is written to a temporary folder, synced and renamed, so a kill or a full disk leaves
the older ones intact. It is renamed before it is deleted, so no part of it looks like a checkpoint.
Hashes are compared when it is read.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.files import DiskFull, complete_directory
from qlora_lite.foundation.json_files import Count, JsonFile, NonNegative, check_as, shown
from qlora_lite.foundation.sealed import hashes_of, read_sealed, require_files, write_sealed
from qlora_lite.shards.writer import save_tensors

_ADAPTER, _OPTIMIZER, _STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"


_NAME = re.compile(r"step-[0-9]{1,12}")


class ProgressNumbers(JsonFile):
    """`progress` in `state.json`: the fields of `loop.Progress`."""

    model_config = ConfigDict(extra="forbid")

    step: Count
    tokens: Count
    seconds: NonNegative
    first_loss: NonNegative | None
    last_loss: NonNegative | None
    best_loss: NonNegative | None
    best_step: Count
    scorings_since_best: Count
    stopped_early: bool
    total: Count


class _StateFile(JsonFile):
    """`state.json`."""

    origin: dict[str, Any]
    progress: ProgressNumbers
    engine: dict[str, Any]
    method: dict[str, Any]


@dataclass(frozen=True)
class TrainingState:
    """Everything that a run needs to continue bit for bit."""

    adapter: dict[str, Tensor]
    engine: dict[str, Any]
    method: dict[str, Any]
    progress: dict[str, Any]
    """Numbers: steps done, tokens, seconds, early stopping."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What the run depends on: settings and fingerprints, by name."""


def save(directory: Path, step: int, state: TrainingState, keep: int) -> Path:
    """Write `step-NNNNNN`, then remove all but the newest `keep` checkpoints.

    Raises:
        RunError: if the disk is full; older checkpoints are unchanged.
    """
    target = directory / f"step-{step:06d}"
    numbers: dict[str, Any] = {"origin": state.origin, "progress": state.progress}
    numbers |= {"engine": {}, "method": {}}
    tensors: dict[str, Tensor] = {}
    for owner, values in (("engine", state.engine), ("method", state.method)):
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{owner}/{name}"] = value
            else:
                numbers[owner][name] = value
    try:
        with complete_directory(target) as temporary:
            save_tensors(state.adapter, temporary / _ADAPTER)
            save_tensors(tensors, temporary / _OPTIMIZER)
            hashes = hashes_of(temporary, [_ADAPTER, _OPTIMIZER])
            write_sealed(temporary / _STATE, numbers, hashes)
    except DiskFull as error:
        older = newest(directory)
        left = f"{older.name} is intact and the same command continues from it" if older else None
        fewer = ", or lower checkpoints.keep," if keep > 1 else ""
        raise RunError(
            f"the disk is full: checkpoint {target} could not be written. "
            f"{left or 'There is no earlier one'}. Free some space{fewer} and run the same "
            "command again"
        ) from error
    for old in all_checkpoints(directory)[:-keep]:
        doomed = old.with_name(f".{old.name}.deleting")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(old, doomed)
        shutil.rmtree(doomed)
    return target


def clean(directory: Path) -> None:
    """Remove what a kill left: half-written and half-deleted checkpoints. A checkpoint that was
    being replaced is restored. Only call this with the run's lock."""
    for path in directory.glob(".*.old"):
        target = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if not target.exists():
            os.replace(path, target)
    for pattern in (".*.writing", ".*.deleting", ".*.old"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def load(checkpoint: Path) -> TrainingState:
    """Read a checkpoint.

    Raises:
        RunError: if a file of the checkpoint is damaged.
    """
    try:
        numbers = read_sealed(checkpoint / _STATE)
        state = check_as(numbers, _StateFile)
        if state.progress.step != step_of(checkpoint):
            raise ValueError(f"{_STATE} is of step {state.progress.step}")
        require_files(checkpoint, numbers, _OPTIMIZER)
        tensors = load_file(checkpoint / _OPTIMIZER)
        adapter = load_adapter(checkpoint)
        if unknown := [n for n in tensors if n.partition("/")[0] not in ("engine", "method")]:
            raise ValueError(f"{_OPTIMIZER} has a tensor {unknown[0]!r}")
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(checkpoint, error) from error
    parts: dict[str, dict[str, Any]] = {"engine": {}, "method": {}}
    for name, tensor in tensors.items():
        owner, _, rest = name.partition("/")
        parts[owner][rest] = tensor.clone()  # the file may be deleted while the run uses it
    for owner, tensors_of in parts.items():
        tensors_of.update(numbers[owner])
    return TrainingState(
        adapter, parts["engine"], parts["method"], numbers["progress"], numbers["origin"]
    )


def require_origin(checkpoint: Path, origin: Mapping[str, Any]) -> None:
    """Check that a checkpoint is one of this run.

    Args:
        origin: what the run depends on. Names that the checkpoint did not record are not compared.

    Raises:
        RunError: naming what differs.
    """
    try:
        recorded = read_sealed(checkpoint / _STATE, "origin")["origin"]
    except (OSError, ValueError) as error:
        raise damaged(checkpoint, error) from error
    different = [name for name, value in origin.items() if recorded.get(name, value) != value]
    if different:
        lines = [f"{name}: {shown(recorded[name])} -> {shown(origin[name])}" for name in different]
        raise RunError(
            f"checkpoint {checkpoint} is of another run:\n  "
            + "\n  ".join(lines)
            + f"\nDelete {checkpoint}, or restore the run's own checkpoints"
        )


def load_adapter(checkpoint: Path) -> dict[str, Tensor]:
    """Read only the adapter of a checkpoint.

    Raises:
        RunError: if it is damaged.
    """
    try:
        require_files(checkpoint, read_sealed(checkpoint / _STATE), _ADAPTER)
        return load_file(checkpoint / _ADAPTER)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(checkpoint, error) from error


def save_best(directory: Path, adapter: dict[str, Tensor], origin: Mapping[str, Any]) -> None:
    """Write or replace `best`, the adapter with the best held-out loss."""
    with complete_directory(directory / "best") as temporary:
        save_tensors(adapter, temporary / _ADAPTER)
        write_sealed(temporary / _STATE, {"origin": origin}, hashes_of(temporary, [_ADAPTER]))


def load_best(directory: Path, origin: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the adapter with the best held-out loss.

    Raises:
        RunError: if it is damaged, or of another run.
    """
    require_origin(directory / "best", origin)
    return load_adapter(directory / "best")


def damaged(checkpoint: Path, error: Exception) -> RunError:
    """The error for a checkpoint that cannot be used."""
    return RunError(
        f"checkpoint {checkpoint} is damaged ({error}). Restore it, or delete that folder to "
        "start again"
    )


def find_newest(directory: Path, note: Callable[[str], None]) -> Path | None:
    """The newest readable checkpoint; None if there are no checkpoints.

    Args:
        note: called with a line about every damaged one.

    Raises:
        RunError: if all of them are damaged.
    """
    found = all_checkpoints(directory)
    for path in reversed(found):
        try:
            load(path)
        except RunError as error:
            if path == found[0]:
                raise
            note(f"{error}. Continuing from the checkpoint before it")
        else:
            return path
    return None


def all_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Folders with other names are ignored."""
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)]
    found = [path for path in found if path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Number of steps that a checkpoint contains."""
    return int(checkpoint.name.removeprefix("step-"))


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = all_checkpoints(directory)
    return found[-1] if found else None
