"""Our masks are those of TRL's marked templates, for every family."""

import pytest

from qlora_lite.data.messages import Conversation, Message, ToolCall
from tests.data.marked_templates import ALSO, require_the_mask_of_trl

ORDINARY = ("cohere2", "glm4moe", "nemotron_3_nano", "qwen2_5", "qwen3", "qwen3_5_think")

CALL = ToolCall("river_length", {"river": "Havel", "unit": "km", "digits": 3}, "call00001")
TOOL = {
    "type": ("function",),
    "function": {
        "name": "river_length",
        "description": "Length of a river",
        "parameters": {
            "type": "object",
            "properties": {"river": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["river"],
        },
    },
}
ASK, CALLS = (
    Message("user", "How long is the Elbe?"),
    Message("assistant", None, tool_calls=(CALL,)),
)
RESULT = Message("tool", "1094", tool_call_id="call00001", name="river_length")
SAID = Message("assistant", "1094 km — zwölf mehr als der Rhein.\n\nReally 🍎.")
ROWS = {
    "one question": Conversation((ASK, SAID)),
    "three questions": Conversation((ASK, SAID, ASK, Message("assistant", "- 1094"), ASK, SAID)),
    "system": Conversation((Message("system", "Be brief."), ASK, SAID)),
    "thought": Conversation((ASK, Message("assistant", "1094 km.", reasoning="It is long."))),
    "tools": Conversation((ASK, SAID), (TOOL,)),
    "a call": Conversation((ASK, CALLS), (TOOL,)),
    "a call and its result": Conversation((ASK, CALLS, RESULT, SAID, ASK, SAID), (TOOL,)),
}


def names_and_rows():
    for name in ALSO:
        for kind, row in ROWS.items():
            marks = [] if name in ORDINARY else [pytest.mark.slow]
            yield pytest.param(name, row, marks=marks, id=f"{name}, {kind}")


@pytest.mark.parametrize(("name", "row"), names_and_rows())
def test_the_mask_is_that_of_the_marked_template(name, row):
    require_the_mask_of_trl(name, row)
