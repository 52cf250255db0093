"""Damaged, mislabelled and unreadable data files: every one is a `DataError` that names the file.

Good files of every kind are mutated. No mutation here leaves rows that could be meant.
"""

import bz2
import gzip
import json
import lzma
import os
import random
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lite.data import sources
from qlora_lite.data.settings import Data
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.tokenise import tokenise
from qlora_lite.foundation.errors import DataError
from tests.tiny import tiny_tokenizer

PAIRS = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}."} for n in range(40)]
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ALPACA = {"instruction": "a", "input": "b", "output": "c"}
JSONL = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()
CSV = ("prompt,completion\n" + "".join(f'{n},"x, {n}"\n' for n in range(40))).encode()
TSV = ("prompt\tcompletion\n" + "".join(f"{n}\tx{n}\n" for n in range(40))).encode()
TEXT = "".join(f"Line {n} of a river.\n\n" for n in range(40)).encode()


def parquet(rows: list[dict] | pa.Table) -> bytes:
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    buffer = BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


PARQUET = parquet(PAIRS)


def zipped(content: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", content)
    return buffer.getvalue()


def damaged_parquet() -> Iterator[tuple[str, bytes]]:
    size = len(PARQUET)
    for part in range(12):
        yield f"first {part} twelfths", PARQUET[: size * part // 12]
    yield "one byte short", PARQUET[:-1]
    yield "first byte missing", PARQUET[1:]
    yield "other magic at the start", b"PORK" + PARQUET[4:]
    yield "other magic at the end", PARQUET[:-4] + b"PORK"
    yield "encrypted magic", PARQUET[:-4] + b"PARE"
    yield "two magics alone", b"PAR1PAR1"
    yield "text", JSONL
    yield "text behind the magic", b"PAR1" + JSONL
    yield "zeros", bytes(size)
    for length in (0, 1, size, 2**31 - 1, 2**32 - 1):
        yield f"footer length {length}", PARQUET[:-8] + length.to_bytes(4, "little") + b"PAR1"
    footer = int.from_bytes(PARQUET[-8:-4], "little")
    yield "zeroed footer", PARQUET[: -8 - footer] + bytes(footer) + PARQUET[-8:]
    yield "zeroed pages", PARQUET[:4] + bytes(size - 12 - footer) + PARQUET[-8 - footer :]
    for seed in range(8):
        rng = random.Random(seed)
        noise = rng.randbytes(footer)
        yield f"random footer {seed}", PARQUET[: -8 - footer] + noise + PARQUET[-8:]
    for name, compress in {"gzip": gzip.compress, "bzip2": bz2.compress}.items():
        yield name, compress(PARQUET)
    yield "no rows", parquet(pa.table({"prompt": pa.array([], pa.string())}))
    yield "no columns", parquet(pa.table({}))
    yield "other columns", parquet([{"a": "b", "c": "d"}])
    yield "same column twice", parquet(pa.table([["a"], ["b"]], names=["prompt", "prompt"]))
    yield "lists for text", parquet([{"prompt": ["a"], "completion": ["b"]}])
    yield "bytes for text", parquet([{"prompt": b"a", "completion": b"b\xff"}])
    yield "dates for text", parquet(pa.table({"text": pa.array([1], pa.date32())}))
    yield "impossible dates", parquet(pa.table({"text": pa.array([2**62], pa.timestamp("us"))}))
    yield "nulls", parquet([{"prompt": "a", "completion": None}])
    yield "text for messages", parquet([{"messages": json.dumps(CHAT["messages"])}])
    yield "lists of text for messages", parquet([{"messages": ["a", "b"]}])
    yield "columns for messages", parquet([{"messages": {"role": ["user"], "content": ["a"]}}])


def damaged_jsonl() -> Iterator[tuple[str, bytes]]:
    lines = JSONL.splitlines(keepends=True)
    for cut in (1, 2, 12, len(lines[0]) // 2, len(lines[0]) - 2):
        yield f"last line cut after {cut}", b"".join(lines[:-1]) + lines[-1][:cut]
        yield f"first line cut after {cut}", lines[0][:cut] + b"\n" + b"".join(lines[1:])
    yield "zeros", bytes(4096)
    yield "zeros at the end", JSONL + bytes(512)
    yield "zeros in the middle", JSONL[:500] + bytes(512) + JSONL[500:]
    yield "a NUL in a text", b'{"prompt": "a\0b", "completion": "c"}'
    yield "a control character in a text", b'{"prompt": "a\x01b", "completion": "c"}'
    yield "two rows on a line", lines[0].rstrip() + lines[1]
    yield "a row on two lines", lines[0].replace(b", ", b",\n")
    yield "single quotes", lines[0].replace(b'"', b"'")
    yield "a trailing comma", lines[0].replace(b"}", b",}")
    yield "a key twice", b'{"prompt": "a", "completion": "b", "prompt": "c"}'
    yield "a nested key twice", b'{"prompt": "a", "completion": "b", "c": {"d": 1, "d": 2}}'
    yield "a huge integer", b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}"
    yield "a huge negative", b'{"prompt": "a", "completion": -' + b"9" * 5000 + b"}"
    yield "a huge float", b'{"prompt": "a", "completion": 1e999}'
    yield "NaN", b'{"prompt": "a", "completion": NaN}'
    yield "deep lists", b'{"a": ' + b"[" * 100_000
    yield "deep objects", b'{"a":' * 100_000
    for depth in (500, 900, 990, 5000):
        yield f"{depth} lists as a row", b"[" * depth + b"]" * depth
        yield (
            f"{depth} lists as a text",
            b'{"prompt": "a", "completion": ' + b"[" * depth + b"]" * depth + b"}",
        )
    yield "half a surrogate pair", b'{"prompt": "a", "completion": "\\ud800"}'
    yield "Latin-1", '{"prompt": "é", "completion": "b"}'.encode("latin-1")
    yield "half a character at the end", '{"prompt": "é'.encode()[:-1]
    yield "UTF-16", JSONL.decode().encode("utf-16")
    yield "UTF-16 without mark", JSONL.decode().encode("utf-16-le")
    yield "UTF-32", JSONL.decode().encode("utf-32")
    yield "nothing", b""
    yield "blank lines", b"\n \n\t\n"
    yield "a byte-order mark alone", b"\xef\xbb\xbf"
    yield "html", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "a pointer of git lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"
    for value in (b"1", b'"a"', b"null", b"true", b"[]", b"[{}]", b"{}"):
        yield f"{value.decode()} as a row", value
    for name, compress in COMPRESSED.items():
        yield name, compress(JSONL)
    yield "a parquet file", PARQUET
    yield "an Arrow file", b"ARROW1\0\0" + bytes(100)
    yield "a database", b"SQLite format 3\0" + bytes(100)


COMPRESSED = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zip": zipped,
    "zstandard": lambda content: b"\x28\xb5\x2f\xfd" + content,
}

WRONG_VALUES = {
    "null": None,
    "true": True,
    "a list": ["a"],
    "an empty list": [],
    "an object": {"a": "b"},
    "infinity": float("1e999"),
    "half a surrogate pair": "a\ud800",
}


def wrong_types() -> Iterator[tuple[str, bytes]]:
    """Every field of every format with every wrong type."""
    for row in (PAIRS[0], ALPACA, {"text": "a"}, CHAT):
        for field in row:
            for kind, value in WRONG_VALUES.items():
                if (field, kind) != ("input", "null"):
                    text = json.dumps({**row, field: value}).replace("Infinity", "1e999")
                    yield f"{field} is {kind}", text.encode()
    for position in (0, 1):
        for field in ("role", "content"):
            for kind, value in {**WRONG_VALUES, "a number": 7, "empty": ""}.items():
                messages = [dict(message) for message in CHAT["messages"]]
                messages[position][field] = value
                if (position, field, kind) == (0, "content", "empty"):
                    continue
                text = json.dumps({"messages": messages}).replace("Infinity", "1e999")
                yield f"{field} of message {position} is {kind}", text.encode()
        for kind, value in {**WRONG_VALUES, "a number": 7}.items():
            messages = [*CHAT["messages"]]
            messages[position] = value
            text = json.dumps({"messages": messages}).replace("Infinity", "1e999")
            yield f"message {position} is {kind}", text.encode()


def damaged_json() -> Iterator[tuple[str, bytes]]:
    array = json.dumps(PAIRS).encode()
    for part in range(1, 6):
        yield f"first {part} sixths", array[: len(array) * part // 6]
    yield "two arrays", array + array
    yield "nothing in the array", b"[]"
    yield "an array of arrays", b"[" + array + b"]"
    yield "rows under a key", b'{"data": ' + array + b"}"
    yield "a key twice", b'[{"prompt": "a", "completion": "b", "prompt": "c"}]'
    yield "a huge integer", b'[{"prompt": "a", "completion": ' + b"9" * 5000 + b"}]"
    yield "deep", b"[" * 100_000
    yield "zeros", bytes(100)
    yield "gzip", gzip.compress(array)


def damaged_csv() -> Iterator[tuple[str, bytes]]:
    yield "an open quotation mark", CSV + b'a,"b\n'
    yield "an open quotation mark at the start", CSV.replace(b"\n0,", b'\n"0,', 1)
    yield "text behind a quotation mark", CSV + b'"a"b,c\n'
    yield "a cell too many", CSV + b"a,b,c\n"
    yield "a cell too few", CSV + b"a\n"
    yield "a header too short", CSV.replace(b"prompt,completion", b"prompt")
    yield "a header too long", CSV.replace(b"prompt,completion", b"prompt,completion,n")
    yield "a name twice", CSV.replace(b"completion", b"prompt")
    yield "no name", CSV.replace(b"completion", b"")
    yield "no header", CSV.split(b"\n", 1)[1]
    yield "semicolons", CSV.replace(b",", b";").replace(b"; ", b" ")
    yield "tabs", TSV
    yield "an empty answer", CSV + b"a,\n"
    yield "zeros at the end", CSV + bytes(512)
    yield "Latin-1", CSV + "é,b\n".encode("latin-1")
    yield "UTF-16", CSV.decode().encode("utf-16")
    yield "header alone", b"prompt,completion\n"
    yield "blank lines", b"\n\n  \n"
    yield "a parquet file", PARQUET
    for name, compress in COMPRESSED.items():
        yield name, compress(CSV)


def damaged_tsv() -> Iterator[tuple[str, bytes]]:
    yield "a cell too many", TSV + b"a\tb\tc\n"
    yield "a cell too few", TSV + b"a\n"
    yield "commas", CSV
    yield "zeros", bytes(100)
    yield "gzip", gzip.compress(TSV)


def damaged_txt() -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "blank", b" \n\n"
    yield "zeros at the end", TEXT + bytes(512)
    yield "Latin-1", TEXT + "é".encode("latin-1")
    yield "UTF-16", TEXT.decode().encode("utf-16")
    yield "half a character at the end", TEXT + "é".encode()[:1]
    for name, compress in COMPRESSED.items():
        yield name, compress(TEXT)


DAMAGED = {
    f"{suffix}: {name}": (f"a.{suffix}", content)
    for suffix, cases in {
        "parquet": damaged_parquet,
        "jsonl": damaged_jsonl,
        "json": damaged_json,
        "csv": damaged_csv,
        "tsv": damaged_tsv,
        "txt": damaged_txt,
    }.items()
    for name, content in cases()
} | {f"types: {name}": ("a.jsonl", content) for name, content in wrong_types()}


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer())


def read(name: str, template: ChatTemplate, **settings):
    data = Data(train=name, max_tokens=200, **settings)
    return tokenise(data, name, template)


def test_the_good_files_are_read(write, template):
    for name, content in {
        "a.jsonl": JSONL,
        "a.json": json.dumps(PAIRS).encode(),
        "a.csv": CSV,
        "a.tsv": TSV,
        "a.parquet": PARQUET,
    }.items():
        assert len(read(write(name, content), template).examples) == 40
    assert len(read(write("a.txt", TEXT), template).examples) > 1
    assert len(DAMAGED) > 200


@pytest.mark.parametrize(("name", "content"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_error_that_names_it(write, template, name, content):
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read(path, template)
    assert path in str(caught.value)
    assert len(str(caught.value)) < 1000 + len(path)


@pytest.mark.parametrize("seed", range(60))
def test_a_parquet_file_with_a_changed_byte_is_refused_or_unchanged(write, template, seed):
    good = read(write("good.parquet", PARQUET), template).examples
    rng = random.Random(seed)
    content = bytearray(PARQUET)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path = write("a.parquet", bytes(content))
    with suppress(DataError):
        assert read(path, template).examples.ids.tolist() == good.ids.tolist()


def folder(path: Path) -> None:
    path.mkdir()


def broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "gone.jsonl")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def link_to_a_folder(path: Path) -> None:
    path.symlink_to(path.parent)


NOT_FILES = {
    folder: "is a folder",
    broken_link: r"is a link to .*gone\.jsonl, which does not exist",
    link_to_itself: "is a link to",
    link_to_a_folder: "is a folder",
    os.mkfifo: "is neither a file nor a folder",
}


@pytest.mark.parametrize(("make", "message"), NOT_FILES.items())
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a"])
def test_what_is_not_a_file_is_named(tmp_path, template, make, message, name):
    path = tmp_path / name
    make(path)
    with pytest.raises(DataError, match=message):
        read(str(path), template)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "/", "x" * 5000, "a\0b.jsonl", "~nobody-here/a.jsonl", "a::b.jsonl", "é"]
)
def test_what_is_not_a_name_is_refused(template, name):
    with pytest.raises(DataError, match=r"which is (not a file|a folder)"):
        read(name, template)


@pytest.mark.parametrize(
    "name", ["a::b.jsonl", "zip::a.csv", "http:::a.parquet", "a*[1]?.json", "a b\n.jsonl", "é.csv"]
)
def test_a_file_may_have_any_name(write, template, name):
    content = {"csv": CSV, "parquet": PARQUET, "json": JSONL, "jsonl": JSONL}
    assert len(read(write(name, content[name.rpartition(".")[2]]), template).examples) == 40


def test_a_file_without_permission_is_named(write, template, monkeypatch):
    path = write("a.jsonl", JSONL)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "file_hash", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: Permission denied"):
        read(path, template)


def test_a_disk_that_fails_while_rows_are_read_is_named(write, template, monkeypatch):
    path = write("a.jsonl", JSONL)

    def fail(path: Path):
        yield 1, PAIRS[0]
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sources, "read_json_lines", fail)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: Input/output error"):
        read(path, template)


PROMPTS = [
    "{prompt!z}",
    "{prompt!}",
    "{prompt",
    "prompt}",
    "{}",
    "{0}",
    "{a.__class__}",
    "{a[0]}",
    "{a:{b}}",
    "{a:{b.__class__}}",
    "{a!r:{b.__class__.__mro__}}",
    "{a:>999999999}",
    "{a:.999999999}",
    "{a b}",
    "{a-b}",
    "text",
    "",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_with_anything_but_fields_is_refused(prompt):
    with pytest.raises(ValueError, match=r"prompt"):
        Data(train="a.jsonl", prompt=prompt)


UNFILLED = {
    "a number's format for a text": ("{a:.2f}", "x"),
    "an unknown format": ("{a:q}", 3),
    "a text's format for a number": ("{a:d}", 1.5),
    "null": ("{a}", None),
    "a list": ("{a}", ["x"]),
    "an object": ("{a}", {"x": 1}),
}


@pytest.mark.parametrize(("prompt", "value"), UNFILLED.values(), ids=UNFILLED)
def test_a_row_that_does_not_fill_the_prompt_is_named(write, template, prompt, value):
    path = write("a.jsonl", json.dumps({"a": value, "completion": "b"}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: field '(a|data\.prompt)'"):
        read(path, template, prompt=prompt)


def test_fields_in_the_prompt_are_text_and_are_not_evaluated(write, template):
    row = {"a": "{b.__class__}", "b": 1, "completion": "c"}
    path = write("a.jsonl", json.dumps(row))
    tokens = read(path, template, prompt="{a} {b:03d} {{a}}").examples.ids
    text = template.tokenizer.decode(tokens.tolist())
    assert "{b.__class__} 001 {a}" in text
