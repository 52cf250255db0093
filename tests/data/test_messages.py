"""Messages of a row: what is read, what is the same, and what is refused."""

import json

import pytest

from qlora_lite.data.formats import FORMATS, Fields
from qlora_lite.data.messages import Conversation, Message, ToolCall, read_message, read_tools
from qlora_lite.data.row_errors import RowError

CALL = {"id": "c1", "type": "function", "function": {"name": "length", "arguments": '{"n": 3}'}}
TOOL = {"type": "function", "function": {"name": "length", "parameters": {"type": "object"}}}


def answer(**fields) -> Message:
    return read_message({"role": "assistant", "content": "Yes.", **fields}, "m")


def test_a_conversation_with_calls_is_read():
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "long?"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1094", "tool_call_id": "c1", "name": "length"},
            {"role": "assistant", "content": "1094 km.", "weight": 0},
            {"role": "user", "content": "Thanks.", "name": "Anna"},
            {"role": "assistant", "content": "You are welcome."},
        ],
        "tools": [TOOL],
    }
    assert FORMATS["messages"].read(Fields(row, {})) == Conversation(
        (
            Message("developer", "Be brief."),
            Message("user", "How long?"),
            Message("assistant", None, tool_calls=(ToolCall("length", {"n": 3}, "c1"),)),
            Message("tool", "1094", tool_call_id="c1", name="length"),
            Message("assistant", "1094 km.", is_trained=False),
            Message("user", "Thanks.", name="Anna"),
            Message("assistant", "You are welcome."),
        ),
        (TOOL,),
    )


def test_tools_and_calls_can_be_json_text_as_in_tables():
    assert read_tools(json.dumps([TOOL]), "tools") == (TOOL,)
    assert read_tools([TOOL | {"strict": None}], "tools") == (TOOL,)
    calls = ToolCall("length", {"n": 3}, "c1")
    assert answer(tool_calls=json.dumps([CALL])).tool_calls == (calls,)
    object_call = {"name": "length", "arguments": {"n": 3}}
    assert answer(tool_calls=[object_call]).tool_calls == (ToolCall("length", {"n": 3}),)


@pytest.mark.parametrize(
    ("fields", "thought", "text"),
    [
        ({"reasoning_content": "Hm."}, "Hm.", "Yes."),
        ({"reasoning": "Hm."}, "Hm.", "Yes."),
        ({"thinking": "Hm.\n"}, "Hm.", "Yes."),
        ({"content": "<think>\nHm.\n</think>\n\nYes."}, "Hm.", "Yes."),
        ({"content": "Hm.\n</think>\n\nYes."}, "Hm.", "Yes."),
        ({"content": "<think>\n\n</think>\n\nYes."}, "", "Yes."),
        ({"content": "Yes. <think>Hm.</think>"}, "", "Yes. <think>Hm.</think>"),
        ({"content": "Write <think>."}, "", "Write <think>."),
    ],
)
def test_reasoning_in_a_field_and_in_the_content_is_the_same(fields, thought, text):
    assert (answer(**fields).thought, answer(**fields).answer) == (thought, text)


@pytest.mark.parametrize(
    ("fields", "is_trained"),
    [
        ({"weight": 0}, False),
        ({"weight": "0.0"}, False),
        ({"train": False}, False),
        ({"train_on_turn": False}, False),
        ({"loss": False, "train": 0}, False),
        ({"mask": True}, False),
        ({"weight": 1.0, "train": "true", "masked": 0}, True),
        ({"weight": None, "loss": ""}, True),
    ],
)
def test_a_turn_is_trained_or_not(fields, is_trained):
    assert answer(**fields).is_trained == is_trained


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0.5}, r"'m\.weight': got 0\.5, 0 or 1 is needed"),
        ({"reasoning": "a", "thinking": "b"}, r"'m\.thinking': differs from reasoning"),
        ({"reasoning": 3}, r"'m\.reasoning': got 3, text is needed"),
        ({"name": 3}, r"'m\.name': got 3, text is needed"),
        ({"tool_calls": {"a": 1}}, "a list of function calls is needed"),
        ({"tool_calls": [{"id": "c1"}]}, r'"function": \{"name": \.\.\.\}\} is needed'),
        ({"tool_calls": [CALL["function"] | {"arguments": "{"}]}, "which is not JSON"),
        ({"tool_calls": [CALL["function"] | {"arguments": [1]}]}, "a JSON object is needed"),
        ({"content": None}, r"'m\.content': got null"),
        ({"content": [{"type": "image_url", "image_url": "a.png"}]}, "only text is supported"),
    ],
)
def test_what_cannot_be_read_is_named(fields, message):
    with pytest.raises(RowError, match=message):
        answer(**fields)


def test_the_text_by_which_rows_are_held_out_has_only_the_fields_that_are_set():
    row = Conversation((Message("user", "a"), Message("assistant", "b")))
    assert repr(row) == (
        "Conversation(messages=(Message(role='user', content='a'), "
        "Message(role='assistant', content='b')))"
    )
    call = Message("assistant", None, tool_calls=(ToolCall("f", {"a": 1}),), is_trained=False)
    assert repr(call) == (
        "Message(role='assistant', content=None, tool_calls=(ToolCall(name='f', "
        "arguments={'a': 1}),), is_trained=False)"
    )
