"""csv and tsv files: every cell is text, and every record has one cell for each column.

The csv builder of `datasets` alone would turn "NA" into null and "007" into 7, fill up short
records, and let an unpaired quotation mark swallow lines. So a file is checked before it is read.
If the quotation marks of a tsv file are not paired, they are read as ordinary characters.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qlora_lite.data.hf_datasets import stream_rows
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
    import datasets

    quoting = _quoting(path)
    _, first = next(_records(path, quoting), (1, []))
    if not first:
        return iter(())
    if columns is None or len(columns) > 1:
        _require_commas(path, first)
    names = columns or first
    _check_records(path, quoting, names, has_header=columns is None)
    rows = stream_rows(
        "csv",
        path,
        sep=_delimiter(path),
        encoding="utf-8-sig",
        quoting=quoting,
        header=0 if columns is None else None,
        column_names=names,
        features=datasets.Features({name: datasets.Value("string") for name in names}),
        keep_default_na=False,
        na_filter=False,
    )
    return enumerate(rows, start=1)


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
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=_delimiter(path), quoting=quoting, strict=True)
            first_line = 1
            for cells in reader:
                if cells:
                    yield first_line, cells
                first_line = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _require_commas(path: Path, first: list[str]) -> None:
    """Refuse a csv file whose only column contains another separator."""
    separators = [mark for mark in (";", "\t") if len(first) == 1 and mark in first[0]]
    if separators and path.suffix == ".csv":
        raise DataError(
            f"{path}, line 1: got one cell, {first[0]!r:.80}: its columns seem to be separated by "
            f"{separators[0]!r}. A .csv file needs commas: convert it, or write it with tabs as a "
            ".tsv file"
        )


def _check_records(path: Path, quoting: Quoting, names: list[str], *, has_header: bool) -> None:
    if len(set(names)) < len(names) or not all(names):
        raise DataError(
            f"{path}, line 1: got the column names {names}. No name may be empty or occur twice. "
            'If this line is data, name the columns: data.columns=\'["text", "label"]\''
        )
    for line, cells in _records(path, quoting):
        if len(cells) != len(names):
            header = "the header" if has_header else "data.columns"
            raise DataError(
                f"{path}, line {line}: got {len(cells)} cells, but {header} has {len(names)} "
                f"({', '.join(names)}): {cells!r:.120}"
            )
