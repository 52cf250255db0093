"""Where a row is, and what is wrong with it: file, line and field."""

import csv
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


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


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


def test_a_json_value_stays_what_it_is(write):
    row = {"text": "2024-01-05", "n": None, "mixed": [1, "a"]}
    name = write("a.jsonl", json.dumps(row) + "\n" + json.dumps({"text": 7}))
    assert [row for _, row in rows(name)] == [row, {"text": 7}]


def test_cells_stay_text(write):
    name = write("a.csv", 'prompt,completion\nNA,007\n"two\nlines, ""quoted""",null\n')
    assert [tuple(row.values()) for _, row in rows(name)] == [
        ("NA", "007"),
        ('two\nlines, "quoted"', "null"),
    ]


def test_a_cell_may_be_long_and_the_limit_of_csv_stays_what_it_was(write):
    name = write("a.csv", f"prompt,completion\na,{'b' * 5000}\n")
    before = csv.field_size_limit(1000)
    try:
        assert len(rows(name)[0][1]["completion"]) == 5000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_a_stray_quotation_mark_in_a_tsv_file_swallows_nothing(write):
    name = write("a.tsv", 'text\tlabel\n"begun\t1\nplain\t0\n"so" he said\t1\n')
    assert [row["text"] for _, row in rows(name)] == ['"begun', "plain", '"so" he said']


def test_columns_of_a_file_without_header_are_told(write):
    name = write("a.tsv", "good film\t1\nbad film\t0\n")
    found = rows(name, columns=["text", "label"])
    assert found == [
        (1, {"text": "good film", "label": "1"}),
        (2, {"text": "bad film", "label": "0"}),
    ]


def test_a_header_is_never_guessed(write):
    name = write("a.tsv", "good film\t1\nbad film\t0\n")
    with pytest.raises(DataError, match=r"line 2: .*'good film', '1'.*data\.columns"):
        read(name)


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


def test_blank_lines_count_as_lines(write):
    name = write("a.jsonl", f"\n{LINE}\n\n\n{LINE}\n")
    assert [number for number, _ in rows(name)] == [2, 5]


def test_the_place_of_a_csv_row_is_its_line_in_the_file(write):
    name = write("a.csv", 'prompt,completion\n"a\nb\n",c\n\n\nd,e\n')
    source = open_source(name)
    assert [source.where(number) for number, _ in source.rows()] == [
        f"{name}, line 2",
        f"{name}, line 7",
    ]


WRONG = {
    "broken JSON": ("a.jsonl", LINE + '\n{"prompt": "a", \n', r"a\.jsonl, line 2.*broken JSON"),
    "cut off": ("a.jsonl", LINE + "\n" + LINE[:20], r"line 2, column \d+: broken JSON"),
    "too deep": ("a.jsonl", LINE + '\n{"a": ' + "[" * 100_000, "line 2, .*: nested too deeply"),
    "too deep array": (
        "a.json",
        f"[{LINE},\n" + "[" * 99_999 + "]" * 100_000,
        "line 2, .*too deep",
    ),
    "NaN": ("a.jsonl", LINE + '\n{"prompt": "NaN", "completion": NaN}', "line 2, column 33: .*NaN"),
    "Infinity": ("a.json", f'[{LINE},\n{{"completion": -Infinity}}]', "line 2, .*-Infinity is no"),
    "huge number": ("a.jsonl", '{"prompt": "a", "completion": 1e999}', "'completion': got inf"),
    "surrogate": (
        "a.jsonl",
        LINE + '\n{"prompt": "a", "completion": "b\\ud800"}',
        r"line 2: field 'completion': character 1 is '\\ud800', half of a surrogate pair",
    ),
    "surrogate in a message": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "\\udc00"}]}',
        r"line 1: field 'messages\[0\].content': character 0",
    ),
    "broken array": ("a.json", f"[{LINE},\n{LINE},\n]", r"a\.json, line 3.*broken JSON"),
    "no object": ("a.jsonl", LINE + "\n[1]\n", r"line 2: got \[1\]"),
    "no object in an array": ("a.json", f"[{LINE}, 3]", r"item 2: got 3"),
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
    "too many cells": ("a.csv", "prompt,completion\na,b\nc,d,e\n", r"line 3: got 3 cells"),
    "too few cells": ("a.csv", "prompt,completion\na,b\n\nc\n", r"line 4: got 1 cells"),
    "open quote": ("a.csv", 'prompt,completion\na,b\n"c,d\n', r"after line 2: .*quotation"),
    "same name twice": ("a.csv", "a,a\nb,c\n", r"line 1: got the column names"),
    "not parquet": ("a.parquet", "PAR1 not really", r"a\.parquet is not a parquet file"),
    "missing field": (
        "a.jsonl",
        LINE + '\n\n{"prompt": "a", "answer": "b"}\n',
        r"line 3: field 'completion': is missing.*'prompt', 'answer'",
    ),
    "null": ("a.jsonl", LINE + '\n{"prompt": "a", "completion": null}\n', "line 2: .*'completion'"),
    "not text": (
        "a.jsonl",
        '{"prompt": "a", "completion": ["b"]}\n',
        "line 1: field 'completion': got a list, text is needed",
    ),
    "empty answer": ("a.csv", "prompt,completion\na,b\nc,\n", "line 3: .*assistant says nothing"),
    "unknown fields": ("a.jsonl", '{"q": "a", "a": "b"}\n', r"line 1: .*'q', 'a'.*data\.fields"),
    "empty document": ("a.jsonl", '{"text": " "}\n', "line 1: field 'text': is empty"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_with_its_place(write, name, content, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(write(name, content))


CONVERSATIONS = {
    "no list": ("hello", "field 'messages': got a str"),
    "no messages": ([], "holds no messages"),
    "no object": (["a"], r"field 'messages\[0\]': got a str"),
    "bad role": ([{"role": "bot", "content": "a"}], r"'messages\[0\].role': got 'bot'"),
    "no role": ([{"content": "a"}], r"'messages\[0\].role': got None"),
    "no content": ([{"role": "user"}], r"'messages\[0\].content': got null"),
    "number": ([{"role": "user", "content": 3}], r"'messages\[0\].content': got a int"),
    "no answer": ([{"role": "user", "content": "a"}], "ends with the user"),
    "empty answer": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
        "message 1: the assistant says nothing",
    ),
    "late system": (
        [{"role": r, "content": "a"} for r in ("user", "system", "assistant")],
        "message 1 is a system message",
    ),
}


@pytest.mark.parametrize(("messages", "message"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_row_that_is_not_a_conversation_is_refused(write, messages, message):
    name = write("a.jsonl", "\n" + json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=f"a.jsonl, line 2: .*{message}"):
        read(name)


@pytest.mark.parametrize("name", ["missing.jsonl", "a/b/missing", "owner/missing.csv", "", "."])
def test_a_file_that_is_not_there_is_said(name):
    with pytest.raises(DataError, match="which is no file"):
        open_source(name)


def test_a_column_alone_may_hold_any_mark(write):
    name = write("a.csv", 'Hello; world\n"a\tb"\n')
    rows = [row for _, row in open_source(name, ["text"]).rows()]
    assert rows == [{"text": "Hello; world"}, {"text": "a\tb"}]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_file_without_commas_is_said(write, mark):
    name = write("a.csv", f"prompt{mark}completion\n2+2{mark}4\n")
    with pytest.raises(DataError, match=r"divided by .*by commas"):
        read(name)


def test_an_unknown_kind_of_file_is_said(write):
    with pytest.raises(DataError, match=r"'\.xlsx' are not read"):
        open_source(write("a.xlsx", "x"))


def test_nothing_is_copied_into_the_cache_of_datasets(write, tmp_path, monkeypatch):
    import datasets

    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    read(write("a.jsonl", LINE))
    read(write("a.csv", "prompt,completion\na,b\n"))
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size]


def test_nothing_is_printed(write, capfd):
    with pytest.raises(DataError):
        read(write("a.jsonl", LINE + "\n{"))
    read(write("a.csv", "prompt,completion\na,b\n"))
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """A cache that has one data set of the hub, and no network."""
    import datasets
    import huggingface_hub
    from datasets.arrow_writer import ArrowWriter

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "acme___sums" / "main" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list([PAIR])
    writer = ArrowWriter(path=str(folder / "sums-train.arrow"), features=table.features)
    writer.write(PAIR)
    num_examples, num_bytes = writer.finalize()
    info = table.info
    info.builder_name = info.dataset_name = "sums"
    info.config_name, info.version = "main", datasets.Version("0.0.0")
    split = datasets.SplitInfo("train", num_bytes, num_examples, dataset_name="sums")
    info.splits = datasets.SplitDict({"train": split})
    info.write_to_directory(str(folder))


@pytest.mark.parametrize("name", ["acme/sums", "acme/sums:main", "acme/sums:main::train"])
def test_a_data_set_of_the_hub_is_read_from_its_cache(offline_hub, name):
    source = open_source(name)
    assert list(source.rows()) == [(1, PAIR)]
    assert source.where(1) == f"{name}, row 1"
    assert source.fingerprint == f"main/0.0.0/{'0' * 40}/sums-train.arrow"


@pytest.mark.parametrize("name", ["acme/others", "acme/sums:other", "acme/sums::test"])
def test_what_the_hub_does_not_give_is_said(offline_hub, name):
    with pytest.raises(DataError, match=f"the data set '{name}' cannot be read"):
        open_source(name)
