"""Rows of .jsonl and .json files, with the line of anything that is wrong.

Values stay as they are written: readers that guess a schema over many rows turn text into dates and
absent fields into null, and lose the line numbers.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qlora_lite.data.lines import read_lines
from qlora_lite.foundation.errors import DataError

MAX_DIGITS = sys.get_int_max_str_digits()
"""Digits of the largest number that Python reads; longer ones would take quadratic time."""

_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object per line, with the number of its line. Blank lines are skipped.

    Raises:
        DataError: if a line is not a JSON object.
    """
    for number, line in read_lines(path):
        if line.strip():
            value = _decode(line.rstrip(), path, number)
            if isinstance(value, list):
                raise DataError(
                    f"{path}, line {number}: got {_start(value)}, a list. A line needs one object; "
                    "a file with one list of rows needs the suffix .json"
                )
            yield number, _require_object(value, f"{path}, line {number}")


def read_json_array(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of one JSON array, with their position in it, from 1.

    Raises:
        DataError: if the file is not a JSON array of objects.
    """
    text = "".join(line for _, line in read_lines(path))
    for number, item in enumerate(_decode(text, path, 1), start=1):
        yield number, _require_object(item, f"{path}, item {number}")


def is_json_array(path: Path) -> bool:
    """Whether the file starts with `[`."""
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _decode(text: str, path: Path, first_line: int) -> Any:
    try:
        return _parse(text)
    except _RepeatedKeyError as error:
        place = "" if "\n" in text else f", line {first_line}"
        raise DataError(
            f"{path}{place}: an object has the key {error} twice. Remove one of them"
        ) from None
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 30) : error.pos + 30].strip()
        raise DataError(
            f"{path}, line {first_line + error.lineno - 1}, column {error.colno}: broken JSON: "
            f"{error.msg}, near {near!r}. Each row must be a complete JSON object"
            + ("" if path.suffix == ".json" else " on one line")
        ) from None


def _parse(text: str) -> Any:
    """Standard JSON: Python's parser alone would also accept NaN and Infinity.

    Raises:
        json.JSONDecodeError: for anything wrong, with its position.
        _RepeatedKeyError: if an object has a key twice.
    """

    def refuse(constant: str) -> NoReturn:
        found = re.finditer(rf"{_STRING}|({constant})", text)
        place = next(match.start() for match in found if match[1])
        raise json.JSONDecodeError(f"{constant} is not a JSON value", text, place)

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=_object)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, _deepest(text)) from None
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python's limit for converting text to an int
        numbers = re.finditer(rf"{_STRING}|(-?\d{{{MAX_DIGITS + 1},}})", text)
        place = next((match.start() for match in numbers if match[1]), 0)
        raise json.JSONDecodeError(
            f"a number of more than {MAX_DIGITS:,} digits", text, place
        ) from None


class _RepeatedKeyError(Exception):
    """A key that occurs twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Python's parser alone would keep the last of several values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(repr(next(name for name in found if names.count(name) > 1)))
    return found


def _deepest(text: str) -> int:
    """Position of the innermost bracket of a JSON text."""
    depth = deepest = place = 0
    for match in re.finditer(rf"{_STRING}|[\[\]{{}}]", text):
        depth += (match[0] in "[{") - (match[0] in "]}")
        if depth > deepest:
            deepest, place = depth, match.start()
    return place


def _start(value: Any) -> str:
    """The first 80 characters of a value as JSON."""
    try:
        return f"{json.dumps(value, ensure_ascii=False):.80}"
    except RecursionError:
        return "a deeply nested value"


def _require_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: got {_start(value)}, an object is needed: "
            'a row has named fields, such as {"prompt": "...", "completion": "..."}'
        )
    return value
