"""Reading reports its progress several times a second, and ends when the report raises."""

import json
import time
from itertools import pairwise

import pytest

from qlora_lite.data.load import load_data
from qlora_lite.data.settings import Data
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.tokenise import CHUNK_CHARS, CHUNK_ROWS, tokenise
from tests.tiny import tiny_tokenizer


@pytest.fixture
def short_rows(write):
    lines = (json.dumps({"prompt": f"{n} + 1?", "completion": f"{n + 1}."}) for n in range(3500))
    return write("a.jsonl", "\n".join(lines))


def test_the_rows_are_counted_up_to_their_total(short_rows):
    calls = []
    load_data(Data(train=short_rows), tiny_tokenizer(), 0, lambda *call: calls.append(call))
    assert calls == [(n, None) for n in (0, 1000, 2000, 3000, 3500)] + [(3500, 3500)]


def test_rows_of_the_heldout_file_are_counted_again(short_rows):
    calls = []
    data = Data(train=short_rows, heldout=short_rows, max_rows=5)
    template = ChatTemplate(tiny_tokenizer())
    tokenise(data, data.heldout, template, report=lambda *call: calls.append(call))
    assert calls[-1] == (3500, 3500)


def test_long_rows_are_reported_more_often(write):
    calls = []
    lines = (json.dumps({"text": f"{n} " + "river " * 5000}) for n in range(30))
    name = write("a.jsonl", "\n".join(lines))
    data = Data(train=name)
    tokenise(data, name, ChatTemplate(tiny_tokenizer()), report=lambda *call: calls.append(call))
    assert 30_000 * (calls[1][0] - 1) < CHUNK_CHARS < 30_000 * calls[1][0]
    assert len(calls) > 4


def test_reading_ends_when_the_report_raises(short_rows):
    def stop(done_rows: int, total_rows: int | None) -> None:
        if done_rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_data(Data(train=short_rows), tiny_tokenizer(), 0, stop)


def test_the_tokens_do_not_depend_on_the_chunks(short_rows, monkeypatch):
    template = ChatTemplate(tiny_tokenizer())
    data = Data(train=short_rows)
    expected = tokenise(data, short_rows, template).examples
    monkeypatch.setattr("qlora_lite.data.tokenise.CHUNK_ROWS", 7)
    found = tokenise(data, short_rows, template).examples
    assert found.ids.equal(expected.ids)
    assert found.loss_mask.equal(expected.loss_mask)


def test_a_chunk_takes_less_than_a_second(short_rows):
    """With much room: 0.1 s on one core."""
    times = []
    template = ChatTemplate(tiny_tokenizer())

    def report(done_rows: int, total_rows: int | None) -> None:
        times.append(time.process_time())

    tokenise(Data(train=short_rows), short_rows, template, report=report)
    assert CHUNK_ROWS == 1000
    assert max(b - a for a, b in pairwise(times)) < 1
