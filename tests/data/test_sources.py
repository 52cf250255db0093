"""Files of every kind as numbered rows, and the errors for files that cannot be read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lite.data.settings import Data
from qlora_lite.data.sources import open_source
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.tokenise import tokenise
from qlora_lite.foundation.errors import DataError
from tests.tiny import tiny_tokenizer


def rows(name: str, **options) -> list[tuple[int, dict]]:
    return list(open_source(name, **options).rows())


def read(name: str, **settings):
    return tokenise(Data(train=name, **settings), name, ChatTemplate(tiny_tokenizer()))


PAIR = {"prompt": "2 + 2?", "completion": "4"}
LINE = json.dumps(PAIR)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINE + "\n"),
        ("no end.jsonl", LINE),
        ("bom.jsonl", "\ufeff" + LINE),
        ("windows.jsonl", LINE + "\r\n"),
        ("lines.json", LINE),
        ("array[1].json", "[" + LINE + "]"),
        ("a.csv", "prompt,completion\n2 + 2?,4\n"),
        ("bom.csv", "\ufeffprompt,completion\r\n2 + 2?,4\r\n"),
        ("a.tsv", "prompt\tcompletion\n2 + 2?\t4\n"),
    ],
)
def test_a_row_is_the_same_in_every_kind_of_file(write, name, content):
    assert [row for _, row in rows(write(name, content))] == [PAIR]


def test_parquet_rows_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    pq.write_table(pa.table({"messages": messages}), path)
    assert rows(str(path)) == [(1, {"messages": messages[0]})]
    assert read(str(path)).stats.rows == 1


def test_a_text_file_is_cut_at_blank_lines_and_ends_once(write):
    name = write("a.txt", "aaaa\nbbbb\n\ncccc\n\ndddd\n\n\neeee")
    found = rows(name, block_chars=8)
    assert found == [
        (1, {"text": "aaaa\nbbbb\n\n", "is_end": False}),
        (4, {"text": "cccc\n\ndddd\n\n", "is_end": False}),
        (8, {"text": "\neeee", "is_end": True}),
    ]


def test_a_text_file_loses_no_character(test_data):
    path = test_data / "text" / "tinyshakespeare.txt"
    pieces = [row["text"] for _, row in rows(str(path), block_chars=1000)]
    assert "".join(pieces) == path.read_text().rstrip()
    assert max(map(len, pieces)) < 2500


def test_the_place_of_a_row_is_its_line(write):
    places = {
        write("a.jsonl", f"\n{LINE}\n\n\n{LINE}\n"): ["line 2", "line 5"],
        write("a.json", f"[{LINE},\n{LINE}]"): ["item 1", "item 2"],
        write("a.csv", 'prompt,completion\n"a\nb\n",c\n\n\nd,e\n'): ["line 2", "line 7"],
    }
    for name, expected in places.items():
        source = open_source(name)
        found = [source.where(number) for number, _ in source.rows()]
        assert found == [f"{name}, {place}" for place in expected]


WRONG = {
    "empty": ("a.jsonl", "", r"a\.jsonl is empty"),
    "blank": ("a.jsonl", "\n\n", r"a\.jsonl is empty"),
    "empty csv": ("a.csv", "", r"a\.csv is empty"),
    "header alone": ("a.csv", "prompt,completion\n", r"a\.csv is empty"),
    "empty text": ("a.txt", " \n", r"a\.txt is empty"),
    "latin-1": (
        "a.jsonl",
        LINE.encode() + b'\n{"prompt": "caf\xe9", "completion": "b"}\n',
        r"line 2: byte 55 \(0xe9\) is not UTF-8.*iconv",
    ),
    "latin-1 csv": (
        "a.csv",
        b"prompt,completion\na,b\ncaf\xe9,b\n",
        r"line 3: byte 25 \(0xe9\) is not UTF-8",
    ),
    "UTF-16": ("a.jsonl", LINE.encode("utf-16"), r"is UTF-16, .*iconv -f utf-16"),
    "not parquet": ("a.parquet", "PAR1 not really", r"a\.parquet is not a parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_a_file_that_cannot_be_read_is_named_with_the_place(write, name, content, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(write(name, content))


@pytest.mark.parametrize("name", ["missing.jsonl", "a/b/missing", "owner/missing.csv", "", "."])
def test_a_file_that_does_not_exist_is_refused(name):
    with pytest.raises(DataError, match="not a file"):
        open_source(name)


def test_an_unknown_kind_of_file_is_refused(write):
    with pytest.raises(DataError, match=r"'\.xlsx' are not supported"):
        open_source(write("a.xlsx", "x"))
