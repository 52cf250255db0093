"""JSON records that notice damage: each holds its own hash, and those of the files next to it.

write_sealed(directory / "state.json", numbers, hashes_of(directory, ["adapter.safetensors"]))
record = read_sealed(directory / "state.json")     # ValueError if a bit of it changed
require_files(directory, record)                   # ValueError if a bit of a file changed
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_lite.foundation.files import file_hash, read_object, write_json

_SEAL = "sha256"
_FILES = "files"


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, the same for any order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hashes_of(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of some files of a directory, by name."""
    return {name: file_hash(directory / name) for name in names}


def write_sealed(path: Path, value: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """Write a record with its own hash, and those of files that are next to it."""
    record = {k: v for k, v in value.items() if k != _SEAL} | {_FILES: dict(hashes)}
    write_json(path, record | {_SEAL: digest_of(record)})


def read_sealed(path: Path, *needed: str) -> dict[str, Any]:
    """Read a record.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not JSON, has not its hash and all `needed` keys, or changed.
    """
    record = read_object(path, _SEAL, *needed)
    if record.pop(_SEAL) != digest_of(record):
        raise ValueError("it changed since it was written")
    return record


def is_unchanged(record: Mapping[str, Any]) -> bool:
    """Whether a record that was read without a check has its own hash."""
    return record.get(_SEAL) == digest_of({k: v for k, v in record.items() if k != _SEAL})


def require_files(directory: Path, record: Mapping[str, Any], *names: str) -> None:
    """Compare files with the hashes in a record: those of `names`, or all of them.

    Raises:
        ValueError: naming a file that is missing or changed.
    """
    for name, recorded in record[_FILES].items():
        if names and name not in names:
            continue
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if file_hash(path) != recorded:
            raise ValueError(f"{name} changed since it was written")
