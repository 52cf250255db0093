"""Rows of every format as conversations."""

import pytest
from pydantic import ValidationError

from qlora_lite.data.formats import (
    FORMATS,
    Conversation,
    Document,
    Fields,
    Message,
    RowError,
    find_format,
    with_system,
)
from qlora_lite.data.settings import Data

ASK = Conversation((Message("user", "2 + 2?"), Message("assistant", "4")))

ROWS = {
    "messages": {
        "messages": [
            {"role": "user", "content": "2 + 2?", "name": None},
            {"role": "assistant", "content": "4"},
        ]
    },
    "completion": {"prompt": "2 + 2?", "completion": 4},
    "alpaca": {"instruction": "2 + 2?", "input": "", "output": "4", "text": "2 + 2? 4"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_format_is_found_and_read(kind):
    assert find_format(ROWS[kind], {}, has_prompt=False) == kind
    assert FORMATS[kind].read(Fields(ROWS[kind], {})) == ASK


def test_alpaca_puts_the_input_below_the_instruction():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    assert FORMATS["alpaca"].read(Fields(row, {})).messages[0].content == "Add.\n\n2, 2"


def test_text_is_a_document():
    assert FORMATS["text"].read(Fields({"text": "abc"}, {})) == Document("abc")


def test_fields_are_found_by_the_names_they_were_given():
    names = {"prompt": "question", "completion": "answer"}
    row = {"question": "2 + 2?", "answer": "4", "text": "not this"}
    assert find_format(row, names, has_prompt=False) == "completion"
    assert FORMATS["completion"].read(Fields(row, names)) == ASK
    assert find_format({"chat": []}, {"messages": "chat"}, has_prompt=False) == "messages"


def test_a_prompt_is_made_of_a_rows_fields():
    row = {"text": "good {film}", "label": "1"}
    assert find_format(row, {"completion": "label"}, has_prompt=True) == "completion"
    fields = Fields(row, {"completion": "label"}, "Sentence: {text}\nSentiment:")
    assert FORMATS["completion"].read(fields).messages == (
        Message("user", "Sentence: good {film}\nSentiment:"),
        Message("assistant", "1"),
    )
    with pytest.raises(RowError, match=r"'title': is named by data.prompt; .*'text', 'label'"):
        Fields(row, {}, "{title}").user_text()


def test_a_system_message_opens_rows_that_have_none():
    own = Conversation((Message("system", "Be long."), *ASK.messages))
    assert with_system(ASK, "Be brief.").messages == (
        Message("system", "Be brief."),
        *ASK.messages,
    )
    assert with_system(own, "Be brief.") is own
    assert with_system(ASK, None) is ASK


def test_the_mapping_may_be_the_text_of_one():
    mapping = {"prompt": "question", "completion": "answer"}
    text = '{"prompt": "question", "completion": "answer"}'
    assert Data(train="a.jsonl", fields=text).fields == mapping
    with pytest.raises(ValidationError, match=r"fields"):
        Data(train="a.jsonl", fields="question")


@pytest.mark.parametrize("prompt", ["no field", "{}", "{text.__class__}", "{0}", "{text"])
def test_a_prompt_that_names_no_field_is_refused(prompt):
    with pytest.raises(ValidationError):
        Data(train="a.csv", prompt=prompt)
