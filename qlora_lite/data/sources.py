"""Files and hub data sets as a stream of numbered rows, where each number has a readable place.

A .txt file is cut at blank lines into rows of about one bin each. Anything that is wrong with a
file, from its permissions to a single byte, is a `DataError` with its place.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.data.file_kinds import require_kind
from qlora_lite.data.hub import load_hub_rows
from qlora_lite.data.json_rows import is_json_array, read_json_array, read_json_lines
from qlora_lite.data.lines import read_lines
from qlora_lite.data.parquet_rows import read_parquet
from qlora_lite.data.source_names import SUFFIXES, require_hub_id, to_path
from qlora_lite.data.tables import line_of_record, num_blank_records, read_table
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.files import file_hash

Rows = Iterator[tuple[int, dict[str, Any]]]

TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class Source:
    """Numbered rows."""

    name: str
    fingerprint: str
    rows: Callable[[], Rows]
    """Starts reading from the first row."""
    where: Callable[[int], str]
    """The place of a row: `train.jsonl, line 17`."""
    is_text_file: bool = False
    """Rows are `{"text": ..., "is_end": ...}`: pieces of one text, in order."""
    num_blank: Callable[[], int] = lambda: 0
    """Counts the records that are skipped because they are blank."""


def open_source(name: str, columns: list[str] | None = None, block_chars: int = 4096) -> Source:
    """A file, by its extension, or a data set of the hub.

    Args:
        columns: names of the columns of a csv or tsv file without a header.
        block_chars: a .txt file is cut into rows of about this many characters.

    Raises:
        DataError: if it does not exist or its kind is not supported; and while its rows are read,
            if it is empty or a row is broken.
    """
    path = to_path(name)
    if not os.path.isfile(path):
        rows, fingerprint = load_hub_rows(*require_hub_id(name, repr(name)), name)
        return Source(name, fingerprint, rows, lambda number: f"{name}, row {number}")
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path}: files of kind {path.suffix or '(no extension)'!r} are not supported. "
            f"Convert it to one of {', '.join(SUFFIXES)}"
        )
    if columns and path.suffix not in TABLES:
        raise DataError(f"{path}: data.columns is only for csv and tsv files. Remove it")
    with _os_errors(path):
        require_kind(path)
        fingerprint = file_hash(path)
    read, place = _reader(path, columns, block_chars)
    return Source(
        str(path),
        fingerprint,
        lambda: _checked(path, read),
        lambda number: f"{path}, {place(number)}",
        is_text_file=path.suffix == ".txt",
        num_blank=lambda: num_blank_records(path) if path.suffix in TABLES else 0,
    )


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into a `DataError`."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check its permissions and its disk"
        ) from None


def _reader(
    path: Path, columns: list[str] | None, block_chars: int
) -> tuple[Callable[[], Rows], Callable[[int], str]]:
    """The function that reads a file, and one that turns a row's number into its place."""
    if path.suffix in TABLES:
        has_header = columns is None
        return (
            lambda: read_table(path, columns),
            lambda number: f"line {line_of_record(path, number, has_header=has_header)}",
        )
    if path.suffix == ".parquet":
        return lambda: read_parquet(path), "row {}".format
    if path.suffix == ".txt":
        return lambda: _text_blocks(path, block_chars), "line {}".format
    if path.suffix == ".json" and is_json_array(path):
        return lambda: read_json_array(path), "item {}".format
    return lambda: read_json_lines(path), "line {}".format


def _checked(path: Path, read: Callable[[], Rows]) -> Rows:
    """The rows of a file; an error if there are none, or if it is not UTF-8."""
    is_empty = True
    try:
        with _os_errors(path):
            for number, row in read():
                is_empty = False
                yield number, row
    except UnicodeDecodeError:
        raise DataError(_invalid_utf8(path)) from None
    if is_empty:
        raise DataError(f"{path} is empty; at least one row is needed. Was it written completely?")


def _text_blocks(path: Path, block_chars: int) -> Rows:
    """Rows `{"text": ..., "is_end": ...}`, numbered by their first line.

    A block ends at the first blank line after `block_chars` characters. If there is none, it ends
    at the end of the line that brings it to twice as many.
    """
    block: list[str] = []
    size, first_line, number = 0, 1, 0
    for number, line in read_lines(path):
        if block and (size >= 2 * block_chars or (size >= block_chars and not block[-1].strip())):
            yield first_line, {"text": "".join(block), "is_end": False}
            block, size, first_line = [], 0, number
        block.append(line)
        size += len(line)
    text = "".join(block).rstrip()
    if text:
        yield first_line, {"text": text, "is_end": True}


def _invalid_utf8(path: Path) -> str:
    """The error message for a file that is not UTF-8: where, and how to convert it."""
    offset = 0
    with open(path, "rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return (
                f"{path} is UTF-16, UTF-8 is needed. Convert the file: "
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
