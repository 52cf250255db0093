"""JSON lines and arrays: values unchanged, and the line of anything that is wrong."""

import json
from pathlib import Path

import pytest

from qlora_lite.data.json_rows import is_json_array, read_json_array, read_json_lines
from qlora_lite.foundation.errors import DataError

LINE = json.dumps({"prompt": "2 + 2?", "completion": "4"})


def rows(name: str) -> list[tuple[int, dict]]:
    path = Path(name)
    return list(read_json_array(path) if is_json_array(path) else read_json_lines(path))


def test_a_json_value_is_not_converted(write):
    row = {"text": "2024-01-05", "n": None, "mixed": [1, "a"]}
    name = write("a.jsonl", json.dumps(row) + "\n" + json.dumps({"text": 7}))
    assert [row for _, row in rows(name)] == [row, {"text": 7}]


def test_blank_lines_count_as_lines(write):
    name = write("a.jsonl", f"\n{LINE}\n\n\n{LINE}\n")
    assert [number for number, _ in rows(name)] == [2, 5]


@pytest.mark.parametrize("start", ["[", "\ufeff[", " \n["])
def test_an_array_is_recognised_by_its_bracket(write, start):
    assert rows(write("a.json", f"{start}{LINE}, {LINE}]")) == [
        (1, json.loads(LINE)),
        (2, json.loads(LINE)),
    ]


WRONG = {
    "broken": ("a.jsonl", LINE + '\n{"prompt": "a", \n', r"a\.jsonl, line 2.*broken JSON"),
    "cut off": ("a.jsonl", LINE + "\n" + LINE[:20], r"line 2, column \d+: broken JSON"),
    "too deep": ("a.jsonl", LINE + '\n{"a": ' + "[" * 100_000, "line 2, .*: nested too deeply"),
    "too deep array": (
        "a.json",
        f"[{LINE},\n" + "[" * 99_999 + "]" * 100_000,
        "line 2, .*too deep",
    ),
    "NaN": ("a.jsonl", LINE + '\n{"prompt": "NaN", "completion": NaN}', "line 2, column 33: .*NaN"),
    "Infinity": ("a.json", f'[{LINE},\n{{"completion": -Infinity}}]', "line 2, .*-Infinity is not"),
    "broken array": ("a.json", f"[{LINE},\n{LINE},\n]", r"a\.json, line 3.*broken JSON"),
    "not an object": ("a.jsonl", LINE + "\n[1]\n", r"line 2: got \[1\], a list.*suffix \.json"),
    "not an object in an array": ("a.json", f"[{LINE}, 3]", r"item 2: got 3"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_broken_json_is_named_with_its_line(write, name, content, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        rows(write(name, content))
