"""csv and tsv files: cells as text, and the line of anything that is wrong."""

import csv
from pathlib import Path

import pytest

from qlora_lite.data.tables import line_of_record, num_blank_records, read_table
from qlora_lite.foundation.errors import DataError


def rows(name: str, columns: list[str] | None = None) -> list[tuple[int, dict]]:
    return list(read_table(Path(name), columns))


def test_cells_are_text(write):
    name = write("a.csv", 'prompt,completion\nNA,007\n"two\nlines, ""quoted""",null\n')
    assert [tuple(row.values()) for _, row in rows(name)] == [
        ("NA", "007"),
        ('two\nlines, "quoted"', "null"),
    ]


def test_a_long_cell_is_read_and_the_limit_of_csv_is_restored(write):
    name = write("a.csv", f"prompt,completion\na,{'b' * 5000}\n")
    before = csv.field_size_limit(1000)
    try:
        assert len(rows(name)[0][1]["completion"]) == 5000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_an_unpaired_quotation_mark_in_a_tsv_file_is_text(write):
    name = write("a.tsv", 'text\tlabel\n"begun\t1\nplain\t0\n"so" he said\t1\n')
    assert [row["text"] for _, row in rows(name)] == ['"begun', "plain", '"so" he said']


def test_a_file_without_header_gets_the_given_columns(write):
    name = write("a.tsv", "good film\t1\nbad film\t0\n")
    found = rows(name, ["text", "label"])
    assert found == [
        (1, {"text": "good film", "label": "1"}),
        (2, {"text": "bad film", "label": "0"}),
    ]


def test_a_header_is_never_guessed(write):
    name = write("a.tsv", "good film\t1\nbad film\t0\n")
    assert rows(name) == [(1, {"good film": "bad film", "1": "0"})]


def test_a_record_has_the_line_on_which_it_starts(write):
    path = Path(write("a.csv", 'prompt,completion\n"a\nb\n",c\n\n\nd,e\n'))
    numbers = [number for number, _ in read_table(path, None)]
    assert [line_of_record(path, n, has_header=True) for n in numbers] == [2, 7]
    assert line_of_record(path, 1, has_header=False) == 1


def test_a_single_column_may_contain_other_separators(write):
    name = write("a.csv", 'Hello; world\n"a\tb"\n')
    assert [row for _, row in rows(name, ["text"])] == [{"text": "Hello; world"}, {"text": "a\tb"}]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_file_with_another_separator_is_refused(write, mark):
    name = write("a.csv", f"prompt{mark}completion\n2+2{mark}4\n")
    with pytest.raises(DataError, match=r"a\.csv, line 1: .*separated by .*needs commas"):
        rows(name)


WRONG = {
    "too many cells": ("prompt,completion\na,b\nc,d,e\n", r"line 3: got 3 cells"),
    "too few cells": ("prompt,completion\na,b\n\nc\n", r"line 4: got 1 cells"),
    "open quote": ('prompt,completion\na,b\n"c,d\n', r"after line 2: .*quotation"),
    "same name twice": ("a,a\nb,c\n", r"line 1: got the column names"),
    "no name": ("a,\nb,c\n", r"line 1: got the column names"),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_a_broken_record_is_named_with_its_line(write, content, message):
    with pytest.raises(DataError, match=rf"a\.csv, {message}"):
        rows(write("a.csv", content))


BLANK = {
    "between": ("text\na\n\n  \nb\n", 2, ["a", "b"]),
    "at the end": ("text\na\nb\n\n\n", 0, ["a", "b"]),
    "quoted": ('text\na\n""\nb\n', 1, ["a", "b"]),
    "before the header": ("\ntext\na\n", 1, ["a"]),
    "several columns": ("text,label\na,b\n\nc,d\n", 0, ["a", "c"]),
}


@pytest.mark.parametrize(("content", "count", "texts"), BLANK.values(), ids=BLANK)
def test_blank_records_of_one_column_are_skipped_and_counted(write, content, count, texts):
    name = write("a.csv", content)
    assert [row["text"] for _, row in rows(name)] == texts
    assert num_blank_records(Path(name)) == count
    for number, row in rows(name):
        line = line_of_record(Path(name), number, has_header=True)
        assert content.splitlines()[line - 1].startswith(row["text"])
