"""Records the calls that make files survive a power cut, in their order.

    calls = record_disk_calls(monkeypatch, tmp_path)
    write_text(tmp_path / "a.txt", "hello")
    assert calls == ["sync .a.txt.writing (5 bytes)", "rename .a.txt.writing -> a.txt", "sync ."]

No test can cut the power, so these check the order instead: a file is synced with its full content
before it is renamed, and its directory after that. Linux only: paths come from /proc/self/fd.
"""

import os
from pathlib import Path
from typing import Any

import pytest


def record_disk_calls(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """From now on every fsync, rename and removal below `root`, with paths relative to it.

    An fsync of a file also records its size at that time: bytes that Python still buffers are
    not on the disk afterwards.
    """
    calls: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def record(action: str, path: Path, more: str = "") -> None:
        if path.is_relative_to(root):
            calls.append(f"{action} {path.relative_to(root)}{more}")

    def recorded_fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        size = "" if path.is_dir() else f" ({os.fstat(handle).st_size} bytes)"
        fsync(handle)
        record("sync", path, size)

    def recorded_replace(source: Any, target: Any) -> None:
        replace(source, target)
        record("rename", Path(source), f" -> {os.path.relpath(target, root)}")

    def recorded_unlink(path: Any, **options: Any) -> None:
        unlink(path, **options)
        record("remove", Path(path))

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(os, "unlink", recorded_unlink)
    return calls
