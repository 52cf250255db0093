"""Files and hub data sets as a stream of rows, each with a place that a person can find.

Everything is read through `datasets`. JSON is read as lines and decoded here: the builder for JSON
guesses a schema over many rows (text that looks like a date becomes a date, absent fields become
null) and forgets the lines. A .txt file becomes rows of about one bin each, cut at blank lines.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qlora_lite.data.streams import lines, quiet, stream, whole
from qlora_lite.data.tables import line_of_record, read_table
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.files import file_hash

Rows = Iterator[tuple[int, dict[str, Any]]]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
TABLES = (".csv", ".tsv")

_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"'


@dataclass(frozen=True)
class Source:
    """Rows with a number each, and what that number means to a reader."""

    name: str
    fingerprint: str
    rows: Callable[[], Rows]
    where: Callable[[int], str]
    """The place of a row: `train.jsonl, line 17`."""
    is_text_file: bool = False
    """Rows are `{"text": ..., "is_end": ...}`: pieces of one text, in order."""


def open_source(name: str, columns: list[str] | None = None, block_chars: int = 4096) -> Source:
    """A file by its extension, or a data set of the hub.

    `columns` are the columns of a csv or tsv file without a header; a .txt file is cut into rows
    of about `block_chars` characters.

    Raises:
        DataError: if it is not there, empty, or of a kind that is not read; and, while its rows
            are read, where they cannot be.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        return _hub(name)
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path}: files of kind {path.suffix or '(no extension)'!r} are not read. "
            f"Convert it to one of {', '.join(SUFFIXES)}"
        )
    if columns and path.suffix not in TABLES:
        raise DataError(f"{path}: data.columns names the columns of a csv or tsv file; remove it")
    rows, place = _reader(path, columns, block_chars)
    return Source(
        str(path),
        file_hash(path),
        lambda: _readable(path, rows),
        lambda number: f"{path}, {place(number)}",
        is_text_file=path.suffix == ".txt",
    )


def require_source(setting: str, name: str) -> None:
    """A quick look, before anything is read.

    Raises:
        DataError: if what `setting` names is neither a file nor the id of a data set.
    """
    if not Path(name).expanduser().is_file():
        _hub_id(name, f"{setting}={name!r}")


def _reader(
    path: Path, columns: list[str] | None, block_chars: int
) -> tuple[Callable[[], Rows], Callable[[int], str]]:
    """How a file is read, and what the number of a row means in it."""
    if path.suffix in TABLES:
        has_header = columns is None
        return (
            lambda: read_table(path, columns),
            lambda number: f"line {line_of_record(path, number, has_header=has_header)}",
        )
    if path.suffix == ".parquet":
        return lambda: _parquet(path), "row {}".format
    if path.suffix == ".txt":
        return lambda: _text_blocks(path, block_chars), "line {}".format
    if path.suffix == ".json" and _is_array(path):
        return lambda: _json_array(path), "item {}".format
    return lambda: _json_lines(path), "line {}".format


def _readable(path: Path, rows: Callable[[], Rows]) -> Rows:
    """The rows of a file, of which there must be one, in UTF-8."""
    is_empty = True
    try:
        for number, row in rows():
            is_empty = False
            yield number, row
    except UnicodeDecodeError:
        raise DataError(_wrong_byte(path)) from None
    if is_empty:
        raise DataError(f"{path} is empty; at least one row is needed. Was it written completely?")


def _json_lines(path: Path) -> Rows:
    for number, line in lines(path):
        if line.strip():
            yield number, _object(_decode(line.rstrip(), path, number), f"{path}, line {number}")


def _json_array(path: Path) -> Rows:
    for number, item in enumerate(_decode(whole(path), path, 1), start=1):
        yield number, _object(item, f"{path}, item {number}")


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _decode(text: str, path: Path, first_line: int) -> Any:
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 30) : error.pos + 30].strip()
        raise DataError(
            f"{path}, line {first_line + error.lineno - 1}, column {error.colno}: broken JSON: "
            f"{error.msg}, near {near!r}. Every row is one whole JSON object"
            + ("" if path.suffix == ".json" else " on a line of its own")
        ) from None


def _parse(text: str) -> Any:
    """JSON as its standard has it, where Python also takes NaN and Infinity.

    Raises:
        json.JSONDecodeError: for all that is wrong with it, with the position.
    """

    def refuse(constant: str) -> NoReturn:
        found = re.finditer(rf"{_STRING}|({constant})", text)
        place = next(match.start() for match in found if match[1])
        raise json.JSONDecodeError(f"{constant} is no value of JSON", text, place)

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


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: got {json.dumps(value, ensure_ascii=False):.80}, which is no object; "
            'a row has named fields, such as {"prompt": "...", "completion": "..."}'
        )
    return value


def _parquet(path: Path) -> Rows:
    from pyarrow import ArrowInvalid

    try:
        yield from enumerate(stream("parquet", path), start=1)
    except ArrowInvalid as error:
        raise DataError(
            f"{path} is not a parquet file, or was cut off: {str(error).splitlines()[0]}. "
            "Write or download it again"
        ) from None


def _text_blocks(path: Path, block_chars: int) -> Rows:
    """Rows `{"text": ..., "is_end": ...}`, numbered by their first line.

    A block ends at the first blank line after `block_chars` characters, or at the end of the line
    at which it has twice as many.
    """
    block: list[str] = []
    size, begin, number = 0, 1, 0
    for number, line in lines(path):
        if block and (size >= 2 * block_chars or (size >= block_chars and not block[-1].strip())):
            yield begin, {"text": "".join(block), "is_end": False}
            block, size, begin = [], 0, number
        block.append(line)
        size += len(line)
    text = "".join(block).rstrip()
    if text:
        yield begin, {"text": text, "is_end": True}


def _wrong_byte(path: Path) -> str:
    """Where a file stops being UTF-8."""
    offset = 0
    with open(path, "rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return (
                f"{path} is UTF-16, and UTF-8 is needed. Convert the file: "
                f"iconv -f utf-16 -t utf-8 {path} > converted{path.suffix}"
            )
        file.seek(0)
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}: byte {offset + error.start} (0x{line[error.start]:02x}"
                    f") is not UTF-8. Convert the file, for example from Latin-1: "
                    f"iconv -f latin1 -t utf-8 {path} > converted{path.suffix}"
                )
            offset += len(line)
    raise AssertionError(f"{path} is UTF-8 after all")


def _hub(name: str) -> Source:
    repository, configuration, split = _hub_id(name, repr(name))
    import datasets

    try:
        with quiet():
            table = datasets.load_dataset(repository, configuration, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the data set {name!r} cannot be read from the hub or its cache: "
            f"{type(error).__name__}: {error}. A configuration and a split are given as in "
            "openai/gsm8k:main::train; a file is given by its path"
        ) from None
    return Source(
        name,
        "; ".join(_version(file["filename"]) for file in table.cache_files),
        lambda: enumerate(table, start=1),
        lambda number: f"{name}, row {number}",
    )


def _hub_id(name: str, got: str) -> tuple[str, str | None, str | None]:
    """`owner/name`, `owner/name:configuration`, either with `::split`."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:::([\w.\[\]:%+-]+))?", name)
    if match is None or Path(name).suffix in SUFFIXES or Path(name).exists():
        raise DataError(
            f"got {got}, which is no file. Needed: a file ({', '.join(SUFFIXES)}), or a hub "
            "id with its configuration and split, such as openai/gsm8k:main::train"
        )
    return match[1], match[2], match[3]


def _version(cached: str) -> str:
    """Configuration, version, revision and file of a part of a hub data set in the cache."""
    return "/".join(Path(cached).parts[-4:])
