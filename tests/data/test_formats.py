"""Rows of every format become conversations or documents."""

import pytest

from qlora_lite.data.formats import FORMATS, Document, Fields, find_format, with_system
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.row_errors import RowError

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
def test_a_format_is_detected_and_read(kind):
    assert find_format(ROWS[kind], {}, has_prompt=False) == kind
    assert FORMATS[kind].read(Fields(ROWS[kind], {})) == ASK


def test_alpaca_appends_the_input_to_the_instruction():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    assert FORMATS["alpaca"].read(Fields(row, {})).messages[0].content == "Add.\n\n2, 2"


def test_text_is_a_document():
    assert FORMATS["text"].read(Fields({"text": "abc"}, {})) == Document("abc")


def test_fields_are_found_by_their_names_in_the_file():
    names = {"prompt": "question", "completion": "answer"}
    row = {"question": "2 + 2?", "answer": "4", "text": "not this"}
    assert find_format(row, names, has_prompt=False) == "completion"
    assert FORMATS["completion"].read(Fields(row, names)) == ASK
    assert find_format({"chat": []}, {"messages": "chat"}, has_prompt=False) == "messages"


def test_the_prompt_template_is_filled_with_the_fields_of_the_row():
    row = {"text": "good {film}", "label": "1"}
    assert find_format(row, {"completion": "label"}, has_prompt=True) == "completion"
    fields = Fields(row, {"completion": "label"}, "Sentence: {text}\nSentiment:")
    assert FORMATS["completion"].read(fields).messages == (
        Message("user", "Sentence: good {film}\nSentiment:"),
        Message("assistant", "1"),
    )
    with pytest.raises(RowError, match=r"'title': is used in data.prompt; .*'text', 'label'"):
        Fields(row, {}, "{title}").user_text()


def test_a_system_message_is_added_to_rows_without_one():
    own = Conversation((Message("system", "Be long."), *ASK.messages))
    assert with_system(ASK, "Be brief.").messages == (
        Message("system", "Be brief."),
        *ASK.messages,
    )
    assert with_system(own, "Be brief.") is own
    assert with_system(ASK, None) is ASK
