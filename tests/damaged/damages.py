"""Ways to damage a file: whole files, single fields of a JSON object, and safetensors."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUGE = 10**400
DEEP = "[" * 5000 + "]" * 5000

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "text": "x",
    "no text": "",
    "path": "../../etc/passwd",
    "negative": -1,
    "fraction": 0.5,
    "huge": HUGE,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "list": [],
    "list of lists": [[1]],
    "object": {},
    "nested object": {"a": {"b": [1]}},
}
"""Wrong values of a field, by name."""


@dataclass(frozen=True)
class Damage:
    """A way to damage one file."""

    name: str
    apply: Callable[[Path], None]
    is_total: bool = False
    """Nothing of the file is left that could be read."""

    def __str__(self) -> str:
        return self.name


def whole_file() -> Iterator[Damage]:
    """Damages of any text file."""
    contents = {
        "empty": b"",
        "binary": bytes(range(256)) * 4,
        "utf-16": '{"a": 1}'.encode("utf-16"),
        "a list": b"[1, 2]",
        "a number": b"1",
        "null": b"null",
        "text": b'"text"',
        "too many digits": b'{"a": ' + b"1" * 5000 + b"}",
        "deep": DEEP.encode(),
        "an empty object": b"{}",
    }
    for name, content in contents.items():
        yield Damage(name, lambda path, content=content: _write(path, content), True)
    yield Damage(
        "half", lambda path: _write(path, path.read_bytes()[: path.stat().st_size // 2]), True
    )
    yield Damage("a folder", _folder, True)


def fields(path: Path, depth: int = 2) -> Iterator[Damage]:
    """Each field of a JSON object deleted, and replaced by each of `VALUES`."""
    for keys in _keys(json.loads(path.read_text(encoding="utf-8")), depth):
        shown = ".".join(keys)
        yield Damage(f"{shown} deleted", lambda p, keys=keys: _edit(p, keys, _DELETE))
        for name, value in VALUES.items():
            yield Damage(
                f"{shown} is {name}", lambda p, keys=keys, value=value: _edit(p, keys, value)
            )


def safetensors() -> Iterator[Damage]:
    """Damages of a safetensors file."""
    yield Damage("empty", lambda path: _write(path, b""), True)
    yield Damage(
        "half", lambda path: _write(path, path.read_bytes()[: path.stat().st_size // 2]), True
    )
    yield Damage("short by one byte", lambda path: _write(path, path.read_bytes()[:-1]), True)
    yield Damage("random", lambda path: _write(path, bytes(range(256)) * 64), True)
    yield Damage("huge header", lambda path: _write(path, struct.pack("<Q", 2**60)), True)
    yield Damage("header is a list", lambda path: _write(path, struct.pack("<Q", 2) + b"[]"), True)
    yield Damage("no tensors", lambda path: _write(path, struct.pack("<Q", 2) + b"{}"), True)
    yield Damage("a folder", _folder, True)
    yield Damage("missing", lambda path: path.unlink(), True)
    for field, value in (
        ("dtype", "F4"),
        ("dtype", 3),
        ("shape", [-1]),
        ("shape", [2**62, 2**62]),
        ("shape", "x"),
        ("data_offsets", [5, 1]),
        ("data_offsets", [0, 2**62]),
    ):
        yield Damage(f"{field} is {value}", lambda p, f=field, v=value: _edit_header(p, f, v), True)


_DELETE = object()


def _keys(value: Any, depth: int, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and depth:
        for name, inner in value.items():
            yield (*path, name)
            yield from _keys(inner, depth - 1, (*path, name))


def _edit(path: Path, keys: tuple[str, ...], value: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    owner = content
    for key in keys[:-1]:
        owner = owner[key]
    if value is _DELETE:
        del owner[keys[-1]]
    else:
        owner[keys[-1]] = value
    _write(path, json.dumps(content).encode())


def _edit_header(path: Path, field: str, value: Any) -> None:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name][field] = value
    text = json.dumps(header).encode()
    _write(path, struct.pack("<Q", len(text)) + text + content[8 + length :])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _write(path: Path, content: bytes) -> None:
    path.unlink()  # it may be a link to the good one
    path.write_bytes(content)
