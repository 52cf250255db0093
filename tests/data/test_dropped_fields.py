"""A row is refused if it has a field that would be dropped and that changes the training."""

import json

import pytest

from qlora_lite.data.read_rows import read_rows
from qlora_lite.data.settings import Data
from qlora_lite.data.sources import open_source
from qlora_lite.foundation.errors import DataError

PAIR = {"prompt": "Which is longer?", "completion": "The Elbe."}
ALPACA = {"instruction": "Which is longer?", "output": "The Elbe."}
TEXT = {"text": "The Elbe is longer."}
CALL = {"id": "c1", "type": "function", "function": {"name": "length", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "length", "parameters": {}}}


def chat(**more) -> dict:
    answer = {"role": "assistant", "content": "The Elbe.", **more}
    return {"messages": [{"role": "user", "content": "Which is longer?"}, answer]}


def read(write, row: dict, **settings):
    name = write("a.jsonl", json.dumps({**row, "n": 1}) + "\n")
    return list(read_rows(open_source(name), Data(train=name, **settings)))


IN_MESSAGES = {
    "function_call": {"name": "length", "arguments": "{}"},
    "images": ["river.png"],
    "audio": {"id": "a1"},
    "prefix": True,
    "refusal": "No.",
    "end_turn": False,
    "weights": [0, 1],
    "a_field_of_tomorrow": "text",
}


@pytest.mark.parametrize("name", IN_MESSAGES)
def test_a_message_with_a_field_that_is_not_rendered_is_refused(write, name):
    value = IN_MESSAGES[name]
    with pytest.raises(DataError) as caught:
        read(write, chat(**{name: value}))
    message = str(caught.value)
    assert f"a.jsonl, line 1: field 'messages[1].{name}': got {value!r:.60}" in message
    assert "emove the field" in message


IN_ROWS = {
    "functions": [{"name": "length"}],
    "tool_calls": [CALL],
    "reasoning_content": "Both are long.",
    "thinking": "Both are long.",
    "enable_thinking": False,
    "chat_template_kwargs": {"enable_thinking": False},
    "documents": [{"text": "Rivers"}],
    "weight": 0.5,
    "weights": [0, 1],
    "train_on_turn": [True, False],
    "train_on_inputs": True,
    "tool": [TOOL],
    "parallel_tool_calls": True,
    "train": "False",
    "loss": 0,
    "mask": 1,
    "images": ["river.png"],
    "audio": "river.wav",
}


@pytest.mark.parametrize(
    "row", [chat(), PAIR, ALPACA, TEXT], ids=["chat", "pair", "alpaca", "text"]
)
@pytest.mark.parametrize("name", IN_ROWS)
def test_a_row_with_a_field_that_is_not_rendered_is_refused(write, name, row):
    with pytest.raises(DataError, match=rf"line 1: field '{name}': got .*emove the field"):
        read(write, {**row, name: IN_ROWS[name]})


@pytest.mark.parametrize("name", ["system", "system_prompt", "history"])
@pytest.mark.parametrize("row", [chat(), PAIR, ALPACA], ids=["chat", "pair", "alpaca"])
def test_a_row_with_a_text_that_would_be_missing_is_refused(write, name, row):
    with pytest.raises(DataError, match=rf"field '{name}': got 'Be brief.'.*data\.prompt"):
        read(write, {**row, name: "Be brief."})
    assert read(write, {**TEXT, name: "Be brief."})


@pytest.mark.parametrize("row", [PAIR, ALPACA, TEXT], ids=["pair", "alpaca", "text"])
def test_tools_are_read_beside_messages_alone(write, row):
    assert dict(read(write, {**chat(), "tools": [TOOL]}))[1].tools == (TOOL,)
    with pytest.raises(DataError, match=r"line 1: field 'tools': got .*emove the field"):
        read(write, {**row, "tools": [TOOL]})


NEUTRAL = {
    "tools": None,
    "tool_calls": [],
    "function_call": {},
    "images": "[]",
    "reasoning_content": "",
    "weight": 1.0,
    "weights": [1, 1.0],
    "train_on_turn": True,
    "parallel_tool_calls": False,
    "train": "true",
    "loss": True,
    "mask": 0,
    "video": False,
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_are_accepted(write, name):
    expected = read(write, chat())
    assert read(write, chat(**{name: NEUTRAL[name]})) == expected
    assert read(write, {**chat(), name: NEUTRAL[name]}) == expected


def test_a_bad_answer_of_preference_data_is_refused_and_a_class_is_not(write):
    with pytest.raises(DataError, match=r"field 'label': got False.*marked as bad"):
        read(write, {**PAIR, "label": False})
    for value in (True, "False", 0, "river"):
        assert read(write, {**PAIR, "label": value}) == read(write, PAIR)
    assert read(write, {**ALPACA, "label": False})


def test_a_row_without_fields_is_named_as_such(write):
    name = write("a.jsonl", "{}\n")
    with pytest.raises(DataError, match="line 1: the row has no fields"):
        list(read_rows(open_source(name), Data(train=name)))


def test_a_turn_that_ends_is_neutral(write):
    assert read(write, chat(end_turn=True)) == read(write, chat())


def test_metadata_and_unrelated_columns_are_accepted(write):
    metadata = {"id": "m1", "timestamp": 17, "model": "x", "metadata": {"a": 1}}
    assert read(write, chat(**metadata)) == read(write, chat())
    columns = {"source": "web", "name": "river", "category": "geography", "text": "Which?", "id": 3}
    assert read(write, {**PAIR, **columns}) == read(write, PAIR)


def test_a_field_that_is_read_under_another_name_or_by_the_prompt_is_accepted(write):
    row = {"prompt": "a", "thinking": "b", "completion": "c"}
    assert read(write, row, fields={"completion": "thinking"})
    prompt = "{system} {history} {weight}"
    row = {"system": "a", "history": "b", "weight": 3, "completion": "c", "input": "d"}
    [(_, conversation)] = read(write, row, prompt=prompt)
    assert conversation.messages[0].content == "a b 3"


def test_the_input_of_an_alpaca_row_is_read_and_that_of_a_pair_is_refused(write):
    assert "two rivers" in str(read(write, {**ALPACA, "input": "two rivers"}))
    with pytest.raises(DataError, match=r"field 'input': got 'two rivers'"):
        read(write, {**PAIR, "input": "two rivers"})


def test_a_long_value_is_shortened(write):
    with pytest.raises(DataError) as caught:
        read(write, chat(prefix="Both are long. " * 1000))
    assert len(str(caught.value)) < 400
