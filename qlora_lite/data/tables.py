"""csv and tsv files: every cell is text, and every record has one cell for each column.

Readers of tables turn "NA" into null and "007" into 7, fill up short records, and let an unpaired
quotation mark swallow lines; so cells are read with `csv` and checked here. If the quotation marks
of a tsv file are not paired, they are read as ordinary characters. Blank lines are no records. In a
file of one column they could be: they are skipped too, and `num_blank_records` counts them.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qlora_lite.data.lines import read_lines
from qlora_lite.foundation.errors import DataError

Quoting = Literal[0, 3]
"""csv.QUOTE_MINIMAL or csv.QUOTE_NONE"""


def read_table(path: Path, columns: list[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records by column, numbered from 1 without the header.

    Args:
        columns: the column names of a file without a header.

    Raises:
        DataError: if a record has too many or too few cells, the column names are unusable, or the
            separator is not a comma; with the line.
    """
    quoting = _quoting(path)
    _, first = next(_records(path, quoting), (1, []))
    if not first:
        return
    if columns is None or len(columns) > 1:
        _require_commas(path, first)
    names = columns or first
    _check_names(path, names)
    has_header = columns is None
    for number, (line, cells) in enumerate(_records(path, quoting), start=1 - has_header):
        if len(cells) != len(names):
            source = "the header" if has_header else "data.columns"
            raise DataError(
                f"{path}, line {line}: got {len(cells)} cells, but {source} has {len(names)} "
                f"({', '.join(names)}): {cells!r:.120}"
            )
        if number > 0:
            yield number, dict(zip(names, cells, strict=True))


def num_blank_records(path: Path) -> int:
    """How many records of a file of one column are blank, up to the last one that is not."""
    blank = pending = 0
    for _, cells in _all_records(path, _quoting(path)):
        if len(cells) > 1:
            return 0
        if _is_blank(cells):
            pending += 1
        else:
            blank, pending = blank + pending, 0
    return blank


def line_of_record(path: Path, number: int, *, has_header: bool) -> int:
    """The line on which a record starts. Cells may contain line breaks, lines may be blank."""
    records = _records(path, _quoting(path))
    return next(line for i, (line, _) in enumerate(records, 1 - has_header) if i == number)


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def _quoting(path: Path) -> Quoting:
    """Whether quotation marks quote cells, or are ordinary characters.

    Raises:
        DataError: if they are not paired in a csv file; with the line.
    """
    last = 0
    try:
        for last, _ in _records(path, csv.QUOTE_MINIMAL):  # noqa: B007
            pass
    except csv.Error as error:
        if path.suffix == ".tsv":
            return csv.QUOTE_NONE
        raise DataError(
            f"{path}, after line {last}: {error}. Quote every cell that contains a quotation "
            'mark, a comma or a line break, and double the quotation marks inside it: ""'
        ) from None
    return csv.QUOTE_MINIMAL


def _records(path: Path, quoting: Quoting) -> Iterator[tuple[int, list[str]]]:
    """The line on which each record starts, and its cells. Blank lines are skipped."""
    width = 0
    for line, cells in _all_records(path, quoting):
        if cells and not (width < 2 and _is_blank(cells)):
            width = width or len(cells)
            yield line, cells


def _all_records(path: Path, quoting: Quoting) -> Iterator[tuple[int, list[str]]]:
    """The same with blank lines."""
    limit = csv.field_size_limit(sys.maxsize)
    lines = (line for _, line in read_lines(path, newline=""))
    try:
        reader = csv.reader(lines, delimiter=_delimiter(path), quoting=quoting, strict=True)
        first_line = 1
        for cells in reader:
            yield first_line, cells
            first_line = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _is_blank(cells: list[str]) -> bool:
    """Whether a record is blank if the file has one column."""
    return not "".join(cells).strip(" \t") and len(cells) < 2


def _require_commas(path: Path, first: list[str]) -> None:
    """Refuse a csv file whose only column contains another separator."""
    separators = [mark for mark in (";", "\t") if len(first) == 1 and mark in first[0]]
    if separators and path.suffix == ".csv":
        raise DataError(
            f"{path}, line 1: got one cell, {first[0]!r:.80}: its columns seem to be separated by "
            f"{separators[0]!r}. A .csv file needs commas: convert it, or write it with tabs as a "
            ".tsv file"
        )


def _check_names(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names) or not all(names):
        raise DataError(
            f"{path}, line 1: got the column names {names}. No name may be empty or occur twice. "
            'If this line is data, name the columns: data.columns=\'["text", "label"]\''
        )
