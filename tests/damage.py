"""Damage files as a disk or a copy does, and kill processes while they write."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora_lite.foundation.sealed import hashes_of, write_sealed


def flip_bit(path: Path, position: int) -> None:
    """Change the lowest bit of one byte; a negative position counts from the end."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def reseal(adapter: Path) -> None:
    """Record the hashes of an adapter's files, and of the record itself, as they are now."""
    record = json.loads((adapter / "qlora_lite.json").read_text(encoding="utf-8"))
    del record["sha256"]
    hashes = hashes_of(adapter, record.pop("files"))
    write_sealed(adapter / "qlora_lite.json", record, hashes)


fork = multiprocessing.get_context("fork")
"""Children that have the imports already. Only for tests with one thread."""

_DISK_CALLS = ("fsync", "replace", "unlink")


def count_disk_calls(patch: pytest.MonkeyPatch) -> list[str]:
    """From now on every sync, rename and removal of a file, by name."""
    calls: list[str] = []
    for name in _DISK_CALLS:
        patch.setattr(os, name, _recorded(name, calls))
    return calls


def _recorded(name: str, calls: list[str]) -> Any:
    function = getattr(os, name)

    def recorded(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    return recorded


def die_at_disk_call(number: int) -> None:
    """Let this process kill itself just before that sync, rename or removal, counted from 1."""
    calls: list[str] = []
    for name in _DISK_CALLS:
        setattr(os, name, _deadly(name, calls, number))


def _deadly(name: str, calls: list[str], number: int) -> Any:
    function = getattr(os, name)

    def deadly(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return deadly
