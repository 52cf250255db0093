"""What a chat template does not write is refused; what it writes in its own way is accepted."""

import pytest

from qlora_lite.data.messages import Conversation, Message, ToolCall
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.templates import ChatTemplate
from tests.tiny import tiny_tokenizer

USER, ANSWER = Message("user", "Why?"), Message("assistant", "Because.")
START = "{% for m in messages %}<|role|>{{ m.role }}\n"
END = "<|end|>{% endfor %}{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
TEXT = START + "{{ m.content }}" + END
FIRST_SYSTEM = START + "{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}" + END
NAMES = START + "{% if m.name %}{{ m.name }}: {% endif %}{{ m.content }}" + END
PARTS = START + "{% for p in m.content %}{{ p.text }}{% endfor %}" + END
AS_JSON = (
    START
    + "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    + END
)
AS_ASCII = AS_JSON.replace("tojson", "tojson(ensure_ascii=True)")
CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    + START
    + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
    + END
)
NO_TOOLS = CALLS.removeprefix("{% if tools %}{{ tools | tojson }}{% endif %}")
ONE_CALL = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
NO_CONTENT = CALLS.replace(
    "{{ m.content or '' }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"
)

TOOL = {"type": "function", "function": {"name": "length"}}
CALL = ToolCall("length", {"river": "Elbe"}, "c1")
RESULT = Message("tool", 'a "b"\nc', tool_call_id="c1", name="length")


def render(template: str, *messages: Message, tools=()):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer).render(Conversation(messages, tools))


def calling(num_calls: int, content: str | None = None) -> Message:
    return Message("assistant", content, tool_calls=(CALL,) * num_calls)


LATE = (Message("system", "Be brief."), USER, ANSWER, Message("system", "Be long."), USER, ANSWER)
NAMED = (Message("user", "Why?", name="Anna"), ANSWER)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "missing"),
    [
        (FIRST_SYSTEM, LATE, (), r"write message 3 \(system\), 'Be long\.', as it is"),
        (TEXT, NAMED, (), "write the name of message 0, 'Anna'"),
        (TEXT, (USER, ANSWER), (TOOL,), "write the tool 'length'"),
        (NO_TOOLS, (USER, calling(1)), (TOOL,), "write the tool 'length'"),
        (TEXT, (USER, calling(1)), (), "write tool calls, as in message 1"),
        (PARTS, (USER, calling(1)), (), "write tool calls, as in message 1"),
        (ONE_CALL, (USER, calling(2)), (TOOL,), "write more than one tool call in a message"),
        (NO_CONTENT, (USER, calling(1, "Wait.")), (TOOL,), r"write message 1 .*'Wait\.', as it is"),
    ],
)
def test_what_is_left_out_is_refused(template, messages, tools, missing):
    with pytest.raises(RowError, match=f"the chat template does not {missing}.*data.template"):
        render(template, *messages, tools=tools)


@pytest.mark.parametrize(
    ("template", "messages", "tools"),
    [
        (TEXT, LATE, ()),
        (NAMES, NAMED, ()),
        (AS_JSON, (USER, ANSWER, RESULT, ANSWER), ()),
        (AS_ASCII, (USER, ANSWER, Message("tool", "Zwölf"), ANSWER), ()),
        (CALLS, (USER, calling(2, "Wait."), RESULT, ANSWER), (TOOL,)),
        (NO_CONTENT, (USER, calling(1), RESULT, ANSWER), (TOOL,)),
    ],
)
def test_what_is_written_is_accepted(template, messages, tools):
    assert len(render(template, *messages, tools=tools).spans) == sum(
        message.role == "assistant" for message in messages
    )


def test_the_developer_is_the_system_where_the_template_does_not_have_that_role():
    row = (Message("developer", "Be brief."), USER, ANSWER)
    assert render(TEXT, *row).text.startswith("<|role|>system\nBe brief.")
    named = "{# developer #}" + TEXT
    assert render(named, *row).text.startswith("<|role|>developer\nBe brief.")
    skips = named.replace("{{ m.content }}", "{{ m.content if m.role != 'developer' }}")
    assert render(skips, *row).text.startswith("<|role|>system\nBe brief.")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("{{ c.function.arguments | tojson }}", '{"river": "Elbe"}'),
        ("{{ c.function.name + c.function.arguments }}", 'length{"river": "Elbe"}'),
        ("{{ c.function.arguments }}", '{"river": "Elbe"}'),
    ],
)
def test_arguments_are_an_object_or_text_as_the_template_takes_them(call, expected):
    template = CALLS.replace("{{ c | tojson }}", call)
    rendered = render(template, USER, calling(1), tools=(TOOL,))
    (start, end) = rendered.spans[0]
    assert rendered.text[start:end] == f"{expected}<|end|>"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{{ m.content }}", ""),
        ("{{ m.content | trim }}", ""),
        ("{{ 'null' if m.content is none else m.content }}", "null"),
    ],
)
def test_content_that_is_null_is_never_written_as_none(content, expected):
    template = CALLS.replace("{{ m.content or '' }}", content)
    rendered = render(template, USER, calling(1), tools=(TOOL,))
    (start, _) = rendered.spans[0]
    assert rendered.text[start:].startswith(expected + '{"id": "c1"')


def test_a_row_without_tools_has_none():
    """As Mistral's template asks for tools."""
    asks = CALLS.replace("{% if tools %}", "{% if tools is not none %}")
    assert render(asks, USER, ANSWER).text.startswith("<|role|>user\nWhy?")


def test_a_result_has_the_id_of_its_call():
    template = CALLS.replace("{{ m.content or '' }}", "{{ m.tool_call_id }}{{ m.content or '' }}")
    text = render(template, USER, calling(1), RESULT, ANSWER, tools=(TOOL,)).text
    assert f"<|role|>tool\nc1{RESULT.content}<|end|>" in text


def test_a_template_of_an_image_model_gets_parts():
    rendered = render(PARTS, USER, ANSWER)
    assert rendered.text == "<|role|>user\nWhy?<|end|><|role|>assistant\nBecause.<|end|>"
