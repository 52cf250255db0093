"""Atomic files and directories, and a lock on a directory.

Content is written under a hidden temporary name, synced to the disk and renamed into place, so a
crash leaves either the old state or the new one.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.units import format_bytes

_LOCK = ".lock"


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it holds the old text or the new one.

    Raises:
        RunError: if its folder does not exist or takes no files, such as /proc.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileNotFoundError as error:
        raise RunError(
            f"the file {path} cannot be created ({error.strerror}). Give a path on a disk that you "
            "may write to"
        ) from error
    os.replace(temporary, path)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def as_stored(value: Any) -> Any:
    """What reading gives after `write_json`: tuples are lists, for example."""
    return json.loads(json.dumps(value))


def read_object(path: Path, *needed: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if it is not JSON, not an object, or has not all `needed` fields.
    """
    value = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    if missing := [name for name in needed if name not in value]:
        raise ValueError(f"it has no {', '.join(missing)}")
    return value


def is_file(path: Path) -> bool:
    """`path.is_file()`, False also for names that the system cannot have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_directory(path: Path) -> bool:
    """`path.is_dir()`, False also for names that the system cannot have."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def make_folder(path: Path) -> None:
    """Create a folder and its parents, if they do not exist.

    Raises:
        RunError: if it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise RunError(
            f"{error.filename} is a file or a broken link, and a folder is needed. Give another "
            "path"
        ) from error
    except OSError as error:
        raise RunError(
            f"the folder {path} cannot be created ({error.strerror}). Give a path on a disk that "
            "you may write to"
        ) from error


def require_possible_folder(path: Path) -> None:
    """Check that a folder exists and can be written, or that it could be created.

    Raises:
        RunError: if not.
    """
    whole = path.absolute()
    existing = next(folder for folder in (whole, *whole.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        kind = "a file" if existing.exists() else "a broken link"
        raise RunError(f"{existing} is {kind}, and a folder is needed. Give another output=...")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"{existing} is not writable. Give another output=...")


def sync_directory(directory: Path) -> None:
    """fsync a directory: renames and new files in it survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """fsync a directory and everything in it."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(directory)


class DiskFull(RunError):
    """The disk is full. What was written before is unchanged."""


def is_disk_full(error: BaseException) -> bool:
    """Whether a full disk or quota caused `error`. safetensors reports it only as text."""
    while error.__cause__ is not None:
        error = error.__cause__
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left on device" in str(error) or "os error 28" in str(error)


@contextmanager
def reporting_full_disk(target: Path) -> Iterator[None]:
    """Turn the many errors of a full disk into one.

    Raises:
        DiskFull: if the block fails because the disk is full.
    """
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise DiskFull(
                f"the disk is full: {target} could not be written. Free some space and run the "
                "same command again"
            ) from error
        raise


@contextmanager
def complete_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill; when the block succeeds it becomes `target`, atomically.

    An error removes the temporary directory. A kill leaves it as a hidden `.name.writing`, which
    the next attempt removes. An existing `target`, also a file, is replaced; a kill between the two
    renames leaves it as `.name.old`, which the next attempt restores.

    Raises:
        DiskFull: if the disk is full.
        RunError: if the directory cannot be created.
    """
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        os.replace(old, target)
    _remove(old)
    temporary = target.with_name(f".{target.name}.writing")
    _remove(temporary)
    try:
        with reporting_full_disk(target):
            make_folder(temporary)
            yield temporary
            sync_tree(temporary)
    except BaseException:
        _remove(temporary)
        raise
    if target.exists():
        os.replace(target, old)
        os.replace(temporary, target)
        _remove(old)
    else:
        os.replace(temporary, target)
    sync_directory(target.parent)


def _remove(path: Path) -> None:
    """Remove a directory or a file, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


@dataclass(frozen=True)
class Lock:
    """An exclusive lock on a directory."""

    directory: Path
    file: IO[str]

    @property
    def is_held(self) -> bool:
        """Whether the locked file is still the one in the directory."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.directory / _LOCK))
        except OSError:
            return False

    def require(self) -> None:
        """Call this before writing.

        Raises:
            RunError: if the directory or its lock was deleted or replaced. Another process may be
                using the directory then.
        """
        if not self.is_held:
            raise RunError(
                f"{self.directory} or its {_LOCK} file was moved or deleted while this process was "
                "using it. Nothing more is written there. Run the same command again: it continues "
                "from the last checkpoint that is left"
            )


@contextmanager
def lock(directory: Path) -> Iterator[Lock]:
    """Hold an exclusive lock on a directory while the block runs.

    The operating system releases it when the process ends, even if it was killed.

    Raises:
        RunError: if another process holds it.
    """
    while True:
        with open(directory / _LOCK, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                raise RunError(
                    f"{directory} is in use by process {holder}. Only one process may work in a "
                    "folder at a time: wait for it, end it, or give another output=..."
                ) from None
            held = Lock(directory, file)
            if not held.is_held:  # its last holder deleted it after we opened it
                continue
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield held
            return


def require_free_space(directory: Path, num_bytes: int, purpose: str) -> None:
    """Check the free space before the first byte is written.

    Raises:
        RunError: if the file system of `directory` has less than `num_bytes` left.
    """
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise RunError(
            f"{purpose} needs {format_bytes(num_bytes)} in {directory}, but only "
            f"{format_bytes(free)} are free. Free some space, or write to another disk"
        )


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
