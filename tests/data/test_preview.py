"""Rows token by token, counts and the histogram of the preview."""

import json

from qlora_lite.data.load import load_data
from qlora_lite.data.preview import LengthBar, length_bars, preview
from qlora_lite.data.settings import Data
from tests.tiny import tiny_tokenizer


def prepared(tmp_path):
    rows = [{"prompt": f"Count {n}.", "completion": "Zwölf 苹果 🍎 " * n} for n in range(1, 201)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(train=str(path), max_tokens=1024, too_long="drop", heldout_share=0)
    return load_data(data, tiny_tokenizer(), 0)


def test_a_row_is_shown_completely_with_its_trained_tokens(tmp_path):
    shown = preview(prepared(tmp_path))
    row = shown.rows[1]
    assert row.where.endswith("a.jsonl, line 2")
    answer = "Zwölf 苹果 🍎 Zwölf 苹果 🍎 <|end|>"
    text = f"<|begin|><|role|>user\nCount 2.<|end|>\n<|role|>assistant\n{answer}"
    assert "".join(piece.text for piece in row.pieces) == text
    assert "".join(piece.text for piece in row.pieces if piece.is_trained) == answer
    assert row.num_trained < row.num_tokens


def test_the_counts_are_those_of_the_data(tmp_path):
    data = prepared(tmp_path)
    shown = preview(data, num_rows=1)
    assert len(shown.rows) == 1
    assert shown.num_train == len(data.train) == 200 - data.stats.dropped_rows
    assert shown.trained_tokens == data.train.num_targets
    assert shown.end_of_turn == "<|end|>"
    assert shown.template == "the tokenizer's chat template"
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
