"""Files that are complete or absent: written aside, synced to the disk, renamed into place."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.units import format_bytes


def write_text(path: Path, text: str) -> None:
    """Replace a file at once; after a crash it holds the old text or the new one."""
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of readable JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path, *needed: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if it is no JSON, no object, or lacks one of the `needed` fields.
    """
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    if missing := [name for name in needed if name not in value]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return value


def make_folder(path: Path) -> None:
    """Create a folder and those above it, unless it is there.

    Raises:
        RunError: if there cannot be one of this name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the folder {path} cannot be made ({error.strerror}). Give the path of one on a disk "
            "that you may write to"
        ) from error


def sync_directory(directory: Path) -> None:
    """Make renames inside a directory durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Make everything inside a directory durable."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(directory)


class DiskFull(RunError):
    """There is no room for what was to be written; what was there before is as it was."""


def is_disk_full(error: BaseException) -> bool:
    """At the root of an error; safetensors reports the operating system's as text."""
    while error.__cause__ is not None:
        error = error.__cause__
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error) or "os error 28" in str(error)


@contextmanager
def complete_directory(target: Path) -> Iterator[Path]:
    """A directory to fill; it appears as `target`, synced and whole, when the block ends well.

    After an error or a kill only a hidden `.name.writing` is left, which the next attempt removes.
    An existing `target` is replaced; a kill in between leaves it as `.name.old`, which the next
    attempt puts back.

    Raises:
        DiskFull: if there is no room for it.
        RunError: if there cannot be a folder of this name.
    """
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        os.replace(old, target)
    shutil.rmtree(old, ignore_errors=True)
    aside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        make_folder(aside)
        yield aside
        sync_tree(aside)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if is_disk_full(error):
            raise DiskFull(
                f"the disk is full: {target} could not be written. Free some space, and run the "
                "same command again"
            ) from error
        raise
    if target.exists():
        os.replace(target, old)
        os.replace(aside, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(aside, target)
    sync_directory(target.parent)


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Keep a second process out of a directory while the block runs.

    The lock belongs to the process and ends with it, also when it is killed.

    Raises:
        RunError: if another process holds it.
    """
    with open(directory / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RunError(
                f"{directory} is in use by process {holder}. One process can work in a folder at "
                "a time: wait for it, end it, or give another output=..."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def require_free_space(directory: Path, num_bytes: int, purpose: str) -> None:
    """Refuse before the first byte is written.

    Raises:
        RunError: if the file system of `directory` has less than `num_bytes` left.
    """
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise RunError(
            f"{purpose} needs {format_bytes(num_bytes)} in {directory}, and {format_bytes(free)} "
            "are free. Free some space, or write to another disk"
        )


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
