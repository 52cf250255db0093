"""csv and tsv files: cells stay the text that they are, and every record has as many as the first.

The builder of `datasets` alone would turn "NA" into null and "007" into 7, fill short records
up, and let a stray quotation mark swallow lines. So a file is checked before it is read. In a tsv
file whose quotation marks do not pair up they are text.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qlora_lite.data.streams import stream
from qlora_lite.foundation.errors import DataError

Quoting = Literal[0, 3]
"""csv.QUOTE_MINIMAL or csv.QUOTE_NONE"""


def read_table(path: Path, columns: list[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records, counted from 1 without the header, as text by column.

    Raises:
        DataError: with the line of the first record that does not fit, without a header, or where
            something else than commas divides the columns.
    """
    import datasets

    quoting = _quoting(path)
    _, first = next(_records(path, quoting), (1, []))
    if not first:
        return iter(())
    if columns is None or len(columns) > 1:
        _require_commas(path, first)
    names = columns or first
    _check(path, quoting, names, has_header=columns is None)
    rows = stream(
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
    """The line on which a record begins: one may hold line breaks, and lines may be blank."""
    records = _records(path, _quoting(path))
    return next(line for i, (line, _) in enumerate(records, 1 - has_header) if i == number)


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def _quoting(path: Path) -> Quoting:
    """How quotation marks are meant.

    Raises:
        DataError: with the line, where they do not pair up in a csv file.
    """
    last = 0
    try:
        for last, _ in _records(path, csv.QUOTE_MINIMAL):  # noqa: B007
            pass
    except csv.Error as error:
        if path.suffix == ".tsv":
            return csv.QUOTE_NONE
        raise DataError(
            f"{path}, after line {last}: {error}. A cell that holds a quotation "
            'mark, a comma or a line break is written in quotes, with its own quotes doubled: ""'
        ) from None
    return csv.QUOTE_MINIMAL


def _records(path: Path, quoting: Quoting) -> Iterator[tuple[int, list[str]]]:
    """The line on which each record begins, and its cells; blank lines are passed over."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=_delimiter(path), quoting=quoting, strict=True)
            begin = 1
            for cells in reader:
                if cells:
                    yield begin, cells
                begin = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _require_commas(path: Path, first: list[str]) -> None:
    others = [mark for mark in (";", "\t") if len(first) == 1 and mark in first[0]]
    if others and path.suffix == ".csv":
        raise DataError(
            f"{path}, line 1: got one cell, {first[0]!r:.80}: its columns seem to be divided by "
            f"{others[0]!r}, and in a .csv file they are by commas. Write it with commas, or with "
            "tabs as a .tsv file"
        )


def _check(path: Path, quoting: Quoting, names: list[str], *, has_header: bool) -> None:
    if len(set(names)) < len(names) or not all(names):
        raise DataError(
            f"{path}, line 1: got the column names {names}; each must be there, and only once. If "
            'this line is data, name the columns: data.columns=\'["text", "label"]\''
        )
    for line, cells in _records(path, quoting):
        if len(cells) != len(names):
            header = "the header" if has_header else "data.columns"
            raise DataError(
                f"{path}, line {line}: got {len(cells)} cells where {header} has {len(names)} "
                f"({', '.join(names)}): {cells!r:.120}"
            )
