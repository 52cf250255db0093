"""Rows of .jsonl and .json files, with the line of anything that is wrong.

Lines are decoded here and not by the JSON builder of `datasets`, which guesses a schema over many
rows (text that looks like a date becomes a date, absent fields become null) and loses the line
numbers.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from qlora_lite.data.hf_datasets import read_lines
from qlora_lite.foundation.errors import DataError

_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object per line, with the number of its line. Blank lines are skipped.

    Raises:
        DataError: if a line is not a JSON object.
    """
    for number, line in read_lines(path):
        if line.strip():
            value = _decode(line.rstrip(), path, number)
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
    """

    def refuse(constant: str) -> NoReturn:
        found = re.finditer(rf"{_STRING}|({constant})", text)
        place = next(match.start() for match in found if match[1])
        raise json.JSONDecodeError(f"{constant} is not a JSON value", text, place)

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, _deepest(text)) from None


def _deepest(text: str) -> int:
    """Position of the innermost bracket of a JSON text."""
    depth = deepest = place = 0
    for match in re.finditer(rf"{_STRING}|[\[\]{{}}]", text):
        depth += (match[0] in "[{") - (match[0] in "]}")
        if depth > deepest:
            deepest, place = depth, match.start()
    return place


def _require_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: got {json.dumps(value, ensure_ascii=False):.80}, an object is needed: "
            'a row has named fields, such as {"prompt": "...", "completion": "..."}'
        )
    return value
