"""Long rows, rows without a trained token, and the counts of both."""

import json
from itertools import chain

import pytest

from qlora_lite.data.settings import Data
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.tokenise import NothingTrained, tokenise
from qlora_lite.foundation.errors import DataError
from tests.tiny import BOS, tiny_tokenizer


@pytest.fixture
def jsonl(tmp_path):
    def write(rows: list[dict]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def ask(answer: str) -> dict:
    return {"prompt": "Count.", "completion": answer}


def read(name: str, tokenizer=None, **settings):
    template = ChatTemplate(tokenizer or tiny_tokenizer())
    return tokenise(Data(train=name, **settings), name, template)


SHORT, LONG = "one two", "one two " * 100


def test_up_to_one_percent_of_the_conversations_are_dropped_and_counted(jsonl):
    name = jsonl([ask(LONG), *[ask(f"{SHORT} {i}") for i in range(99)]])
    complete, cut = read(name), read(name, max_tokens=100)
    stats = cut.stats
    assert (stats.rows, stats.examples, stats.dropped_rows, stats.too_long) == (100, 99, 1, (1,))
    assert stats.longest == complete.stats.longest > 100
    assert stats.lost_tokens == stats.longest
    assert stats.tokens + stats.lost_tokens == complete.stats.tokens
    assert stats.lost_share == stats.longest / complete.stats.tokens
    assert cut.examples.rows.tolist() == list(range(2, 101))


def test_dropping_more_than_one_percent_needs_the_policy_drop(jsonl):
    name = jsonl([ask(LONG), ask(LONG), *[ask(f"{SHORT} {i}") for i in range(98)]])
    with pytest.raises(DataError, match=r"2 of 100 rows are longer than data\.max_tokens=100"):
        read(name, max_tokens=100)
    assert read(name, max_tokens=100, too_long="drop").stats.dropped_rows == 2


def test_the_policy_error_names_the_row(jsonl):
    name = jsonl([ask(SHORT), ask(LONG)])
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: the row has \d+ tokens"):
        read(name, max_tokens=100, too_long="error")


@pytest.mark.parametrize("policy", ["split", "truncate"])
def test_the_end_of_a_conversation_is_never_cut_off(jsonl, policy):
    with pytest.raises(DataError, match="would cut off their trained end of turn"):
        read(jsonl([ask(SHORT)]), too_long=policy)


def test_a_file_with_only_too_long_rows_is_an_error(jsonl):
    with pytest.raises(DataError, match="all rows are longer"):
        read(jsonl([ask(LONG)]), max_tokens=100, too_long="drop")


def test_plain_text_is_split_and_every_token_trained_once(jsonl):
    name = jsonl([{"text": LONG}, {"text": SHORT}])
    complete, cut = read(name, max_tokens=1024), read(name, max_tokens=50)
    assert cut.stats.split_rows == 1
    assert cut.stats.lost_tokens == 0
    assert max(cut.examples.lengths) == 50
    trained = [e.ids[e.loss_mask].tolist() for e in complete.examples]
    pieces = [e.ids[e.loss_mask].tolist() for e in cut.examples]
    assert list(chain(*pieces)) == list(chain(*trained))
    bos = tiny_tokenizer().convert_tokens_to_ids(BOS)
    assert all(e.ids[0] == bos for e in cut.examples)


def test_a_row_cut_into_two_pieces_is_counted_as_split(jsonl):
    name = jsonl([{"text": LONG}])
    longest = read(name, max_tokens=1024).stats.longest
    stats = read(name, max_tokens=longest - 1).stats
    assert (stats.rows, stats.examples, stats.split_rows) == (1, 2, 1)


def test_the_policy_truncate_cuts_plain_text(jsonl):
    name = jsonl([{"text": LONG}, {"text": SHORT}])
    stats = read(name, max_tokens=50, too_long="truncate").stats
    assert (stats.examples, stats.truncated_rows) == (2, 1)
    assert stats.lost_tokens == stats.longest - 50


def test_a_row_without_a_trained_token_is_refused_with_its_tokens(jsonl):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].split('>>')[-1]"
    )
    name = jsonl([ask(SHORT), ask("all of it >>")])
    with pytest.raises(
        NothingTrained, match=r"line 2: no token of this row is trained.*<\|role"
    ) as e:
        read(name, tokenizer)
    assert "".join(piece.text for piece in e.value.pieces).endswith("<|role|>assistant\n<|end|>")
    assert not any(piece.is_trained for piece in e.value.pieces)


def test_the_end_of_turn_is_trained_even_if_padding_is_eos(jsonl):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    examples = read(jsonl([ask(SHORT), ask(SHORT + SHORT)]), tokenizer).examples
    for example in examples:
        assert example.ids[-1] == tokenizer.eos_token_id
        assert example.loss_mask[-1]


def test_trained_tokens_are_counted_as_in_the_loss(jsonl):
    result = read(jsonl([ask(SHORT), ask(LONG)]))
    expected = sum(int(e.loss_mask[1:].sum()) for e in result.examples)
    assert result.stats.trained_tokens == expected
    assert result.stats.tokens == sum(result.examples.lengths)


def test_a_turn_that_is_not_trained_needs_a_loss_on_answers(jsonl):
    row = {
        "messages": [
            *({"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}),
            *({"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}),
        ]
    }
    assert read(jsonl([row])).examples.num_targets > 0
    with pytest.raises(DataError, match=r"line 1: .*not trained, and data\.loss_on=all"):
        read(jsonl([row]), loss_on="all")
