"""What the preview shows."""

import json

from qlora_lite.data.coloured import TRAINED, Piece, bracketed, coloured, spell
from qlora_lite.data.load import load_data
from qlora_lite.data.preview import LengthBar, length_bars, preview
from qlora_lite.data.settings import Data
from tests.data.metaspace import metaspace_tokenizer
from tests.tiny import tiny_tokenizer


def prepared(tmp_path):
    rows = [{"prompt": f"Count {n}.", "completion": "Zwölf 苹果 🍎 " * n} for n in range(1, 201)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(train=str(path), max_tokens=1024, too_long="drop", heldout_share=0)
    return load_data(data, tiny_tokenizer(), 0)


def test_a_row_is_spelled_whole_with_what_is_trained(tmp_path):
    shown = preview(prepared(tmp_path))
    row = shown.rows[1]
    assert row.where.endswith("a.jsonl, line 2")
    answer = "Zwölf 苹果 🍎 Zwölf 苹果 🍎 <|end|>"
    text = f"<|begin|><|role|>user\nCount 2.<|end|>\n<|role|>assistant\n{answer}"
    assert "".join(piece.text for piece in row.pieces) == text
    assert "".join(piece.text for piece in row.pieces if piece.is_trained) == answer
    assert row.num_trained < row.num_tokens


def test_the_figures_are_those_of_the_run(tmp_path):
    data = prepared(tmp_path)
    shown = preview(data, num_rows=1)
    assert len(shown.rows) == 1
    assert shown.num_train == len(data.train) == 200 - data.stats.dropped_rows
    assert shown.trained_tokens == data.train.num_targets
    assert shown.end_of_turn == "<|end|>"
    assert shown.has_chat_template
    first = 201 - data.stats.dropped_rows
    assert [place.rpartition(" ")[2] for place in shown.too_long] == [
        str(first + i) for i in range(5)
    ]


def test_every_row_is_in_one_bar(tmp_path):
    train = prepared(tmp_path).train
    bars = length_bars(train)
    assert sum(bar.count for bar in bars) == len(train)
    for bar in bars:
        assert bar.count == sum(bar.shortest <= n <= bar.longest for n in train.lengths)
    assert length_bars(train.select([0]), num_bars=1) == [LengthBar(1, train.lengths[0], 1)]


def test_trained_tokens_stand_out():
    text = coloured([Piece("ask", False), Piece("say", True), Piece("end", True)])
    assert text.plain == "asksayend"
    assert [(s.start, s.end) for s in text.spans if TRAINED in str(s.style)] == [(3, 6), (6, 9)]


def test_trained_tokens_stand_between_brackets_where_there_is_no_colour():
    pieces = [Piece("ask", False), Piece("say", True), Piece("end", True)]
    assert bracketed(pieces) == "ask[[sayend]]"
    assert bracketed([*pieces, Piece("ask", False)]) == "ask[[sayend]]ask"


def test_a_space_that_a_tokenizer_drops_at_the_beginning_is_shown():
    tokenizer = metaspace_tokenizer()
    ids = tokenizer("say two apples left", add_special_tokens=False).input_ids
    assert len(ids) > 2
    pieces = spell(ids, [True] * len(ids), tokenizer)
    assert "".join(piece.text for piece in pieces) == "say two apples left"


def test_parts_of_a_character_are_joined_but_not_across_the_border_of_what_is_trained():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("🍎").input_ids[1:]
    assert len(ids) > 1
    assert [p.text for p in spell(ids, [True] * len(ids), tokenizer)] == ["🍎"]
    assert [p.is_trained for p in spell(ids, [False] + [True] * (len(ids) - 1), tokenizer)] == [
        False,
        True,
    ]
