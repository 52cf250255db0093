"""What a user writes for a source: the path of a file, or the id of a data set of the hub."""

import os
from pathlib import Path

from qlora_lite.data.hub import parse_hub_id
from qlora_lite.foundation.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
MAX_LISTED = 5
"""Files of a folder that an error message lists."""


def to_path(name: str) -> Path:
    """The path that a user means."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~name of an unknown user
        return Path(name)


def require_source(setting: str, name: str) -> None:
    """Check the name of a source without opening it.

    Raises:
        DataError: if the value of `setting` is neither a file nor the id of a data set.
    """
    if not os.path.isfile(to_path(name)):
        require_hub_id(name, f"{setting}={name!r}")


def require_hub_id(name: str, got: str) -> tuple[str, str | None, str | None]:
    """The parts of a hub id.

    Raises:
        DataError: if `name` is none; `got` is how the message quotes it.
    """
    parts, path = parse_hub_id(name), to_path(name)
    if parts is None or path.suffix in SUFFIXES or os.path.lexists(path):
        raise DataError(f"got {got}, which is {_not_a_file(name, path)}")
    return parts


def _not_a_file(name: str, path: Path) -> str:
    """What a path is that is not a file, and what to give instead."""
    files = f"a file ({', '.join(SUFFIXES)})"
    if os.path.islink(path) and not os.path.exists(path):
        target = os.readlink(path)
        return f"a link to {target}, which does not exist. Correct the link, or give {files}"
    if os.path.isdir(path):
        inside = [p for pattern in ("*", "*/*") for p in sorted(path.glob(pattern))]
        found = [str(p) for p in inside if p.suffix in SUFFIXES and p.is_file()]
        more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        hint = f", such as {', '.join(found[:MAX_LISTED])}{more}" if found else f": {files}"
        return f"a folder, not a file. Give one file{hint}"
    if os.path.exists(path):
        return f"neither a file nor a folder. Give {files}"
    try:
        share = float(name)
    except ValueError:
        share = 0.0
    if 0 < share < 1:
        return (
            f"a number, not a file. To hold out a share of the training rows, set "
            f"data.heldout_share={name}"
        )
    return (
        f"not a file. Give {files}, or a hub id with its configuration and split, such as "
        "openai/gsm8k:main::train"
    )
