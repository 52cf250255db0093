"""What is trained of reasoning, of single turns, and of templates with prompts of their own."""

import copy
from functools import cache

import pytest

from qlora_lite.data.encoding import encode
from qlora_lite.data.messages import Conversation, Message, ToolCall
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.templates import ChatTemplate
from tests.data.marked_templates import ALSO, UNMARKED, near_tokenizer, pair
from tests.data.real_tokenizers import original_template, real_tokenizer
from tests.data.trained_texts import trained_texts


def talk(*turns: Message | str) -> Conversation:
    """Answers, each after a question."""
    answers = [Message("assistant", turn) if isinstance(turn, str) else turn for turn in turns]
    return Conversation(tuple(m for a in answers for m in (Message("user", "Go on."), a)))


def thought(text: str, reasoning: str, **fields) -> Message:
    return Message("assistant", text, reasoning=reasoning, **fields)


@cache
def template(name: str) -> ChatTemplate:
    if name in ALSO:
        return pair(name).template
    is_near = name in UNMARKED
    tokenizer = copy.copy(near_tokenizer() if is_near else real_tokenizer("deepseek_v3"))
    tokenizer.chat_template = original_template(name)
    return ChatTemplate(tokenizer)


def trained(name: str, row: Conversation, reasoning: str = "train") -> list[str]:
    chat = template(name)
    (encoded,) = encode(chat, [chat.render(row, reasoning)])
    return trained_texts(chat.tokenizer, encoded.ids, encoded.loss_mask)


END, EOS = "<|im_end|>", "<｜end▁of▁sentence｜>"
FORMS = {
    "qwen3": ("<think>\nHm.\n</think>\n\nOne." + END, "<think>\n\n</think>\n\nTwo." + END),
    "qwen3_5_think": ("Hm.\n</think>\n\nOne." + END, "\n</think>\n\nTwo." + END),
    "qwen3_5_nothink": ("Hm.\n</think>\n\nOne." + END, "Two." + END),
    "nemotron_3_nano": ("Hm.\n</think>\nOne." + END, "Two." + END),
    "glm4moe": ("\n<think>Hm.</think>\nOne.<|user|>", "\n<think></think>\nTwo.<|user|>"),
    "deepseek_r1_distill": ("Hm.\n</think>\n\nOne." + EOS, "\n</think>\n\nTwo." + EOS),
    "gemma4_v5": ("<|channel>thought\nHm.\n<channel|>One.<turn|>", "Two.<turn|>"),
    "lfm2_2_5": ("<think>Hm.</think>One." + END, "Two." + END),
    "muse_glimmer": (
        " to=self<|message|>Hm.<|eom|><|start|>assistant to=user<|message|>One.<|eot|>",
        " to=user<|message|>Two.<|eot|>",
    ),
    "gptoss": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
        "One.<|end|>",
        "<|channel|>final<|message|>Two.<|return|>",
    ),
}
"""What the model says with reasoning, and, as the last answer, without."""

CONTEXT = {
    "glm4moe": "One.<|user|>",
    "gptoss": "<|start|>assistant<|channel|>final<|message|>One.<|end|>",
    "muse_glimmer": "<|start|>assistant to=user<|message|>One.<|eot|>",
    "deepseek_r1_distill": "One." + EOS,
    "gemma4_v5": "One.<turn|>",
}
"""What is trained of the first of these if its reasoning is only given. Default: `One.` and END."""

NAMES = [pytest.param(n, marks=pytest.mark.slow if n == "gptoss" else ()) for n in FORMS]
ROW = talk(thought("One.", "Hm."), "Two.")


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_is_trained_in_every_turn(name):
    assert trained(name, ROW) == list(FORMS[name])


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_in_the_content_is_that_of_the_field(name):
    in_content = talk("<think>\nHm.\n</think>\n\nOne.", "Two.")
    assert trained(name, in_content) == trained(name, ROW)


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_can_be_context(name):
    expected = [CONTEXT.get(name, "One." + END), FORMS[name][1]]
    assert trained(name, ROW, "context") == expected
    chat = template(name)
    assert chat.render(ROW, "context").text == chat.render(ROW).text


@pytest.mark.parametrize("name", NAMES)
def test_dropped_reasoning_is_as_if_it_had_not_been_there(name):
    chat = template(name)
    assert chat.render(ROW, "drop") == chat.render(talk("One.", "Two."))


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_that_is_not_trained_is_context(name):
    row = talk("One.", thought("Wrong.", "Hm.", is_trained=False), "Two.")
    everything = trained(name, talk("One.", "Wrong.", "Two."))
    assert trained(name, row) == [everything[0], everything[2]]
    assert "Wrong." in template(name).render(row).text


def test_what_follows_the_last_trained_turn_is_cut_off():
    row = talk("One.", Message("assistant", "Wrong.", is_trained=False))
    assert template("qwen3").render(row) == template("qwen3").render(talk("One."))


def test_marked_turns_that_are_not_trained_are_context():
    tokenizer = copy.copy(real_tokenizer("qwen3"))
    tokenizer.chat_template = original_template("qwen3_training")
    rendered = ChatTemplate(tokenizer).render(
        talk("One.", Message("assistant", "Wrong.", is_trained=False), "Two.")
    )
    said = [rendered.text[start:end] for start, end in rendered.spans]
    assert said == [f"<think>\n\n</think>\n\n{word}{END}" for word in ("One.", "Two.")]


CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}ANSWER"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nPROMPT{% endif %}"
)


def chatml(answer: str, prompt: str = "") -> ChatTemplate:
    """ChatML whose assistant messages and generation prompt are as given."""
    tokenizer = copy.copy(near_tokenizer())
    tokenizer.chat_template = CHATML.replace("ANSWER", answer).replace("PROMPT", prompt)
    return ChatTemplate(tokenizer)


def said(chat: ChatTemplate, row: Conversation) -> list[str]:
    rendered = chat.render(row)
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_reasoning_with_a_mark_of_its_own_can_be_context():
    thought_of = "<think>{{ m.reasoning_content }}</think>"
    marks = "{% generation %}" + thought_of + "{% endgeneration %} {% generation %}"
    chat = chatml(
        "<|im_start|>assistant\n" + marks + "{{ m.content }}<|im_end|>{% endgeneration %}"
    )
    row = talk(thought("One.", "Hm."))
    assert said(chat, row) == ["<think>Hm.</think> One." + END]
    rendered = chat.render(row, "context")
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["One." + END]


@pytest.mark.parametrize("prompt", ["", "<think>\n"])
def test_the_generation_prompt_is_not_trained_even_if_it_is_marked(prompt):
    """SmolLM3 marks <|im_start|>assistant, and TRL's Qwen3.5 <think>."""
    whole = "<|im_start|>assistant\n" + prompt + "{{ m.content }}<|im_end|>\n"
    chat = chatml("{% generation %}" + whole + "{% endgeneration %}", prompt)
    assert said(chat, talk("One.", "Two.")) == ["One." + END, "Two." + END]


def test_a_thought_that_starts_with_another_line_break_than_the_prompt_is_not_doubled():
    thought_of = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    chat = chatml(f"<|im_start|>assistant\n{thought_of}{{{{ m.content }}}}<|im_end|>", "<think>\n")
    assert said(chat, ROW) == ["Hm.</think>One." + END, "\n</think>\n\nTwo." + END]


def test_a_field_is_a_section_if_the_template_names_sections():
    """As SmolLM3's template, which writes the content as it is."""
    writes = "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n"
    with pytest.raises(RowError, match="has reasoning, which the chat template does not write"):
        chatml(writes).render(ROW)
    names = chatml(writes + "{% if not m %}<think></think>{% endif %}")
    assert said(names, ROW) == ["<think>\nHm.\n</think>\n\nOne." + END, "Two." + END]


def test_an_answer_keeps_the_end_that_it_has_when_messages_follow():
    """As gpt-oss, which ends the last answer with another token."""
    end = "{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}"
    chat = chatml("<|im_start|>assistant\n{{ m.content }}" + end)
    assert said(chat, talk("One.", "Two.", "Three.")) == [
        *("One." + END, "Two." + END, "Three.<|endoftext|>")
    ]
    assert chat.end_of_turn == "<|endoftext|>"


def test_a_template_that_writes_no_end_has_the_start_of_the_next_message():
    """GLM-4.5 stops at the next message: of the user, or with the result of a call."""
    call, answer = said(template("glm4moe"), with_a_call())
    assert call.endswith("</tool_call><|observation|>")
    assert answer.endswith("1094 km.<|user|>")


@pytest.mark.parametrize("name", ["qwen2_5", "cohere2"])
def test_a_template_without_reasoning_refuses_a_field_and_writes_text(name):
    with pytest.raises(RowError, match=r"message 1 .*has reasoning.*data\.reasoning=drop"):
        trained(name, ROW)
    ends = trained(name, talk("One.", "Two."))
    assert trained(name, ROW, "drop") == ends
    text = "<think>\nHm.\n</think>\n\nOne."
    assert trained(name, talk(text, "Two."))[0].startswith(text)
    assert trained(name, talk(text, "Two."), "context") == ends


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"reasoning": "Hm."}, {"content": "Hm."}])
def test_reasoning_before_a_call_is_in_the_prompt_of_the_answer(fields):
    """gpt-oss writes it there only until there is an answer."""
    call = ToolCall("length", {"river": "Elbe"}, "c1")
    tool = {"type": "function", "function": {"name": "length", "description": "", "parameters": {}}}
    row = Conversation(
        (
            Message("user", "How long is the Elbe?"),
            Message("assistant", **({"content": None} | fields), tool_calls=(call,)),
            Message("tool", "1094", tool_call_id="c1", name="length"),
            *(
                Message("assistant", "1094 km."),
                Message("user", "Thanks."),
                Message("assistant", "Yes."),
            ),
        ),
        (tool,),
    )
    said = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.length"
        '<|channel|>commentary json<|message|>{"river": "Elbe"}<|call|>'
    )
    assert trained("gptoss", row) == [
        said,
        "<|channel|>final<|message|>1094 km.<|end|>",
        "<|channel|>final<|message|>Yes.<|return|>",
    ]
    chat = template("gptoss")
    text = chat.render(row).text
    assert f"{said}<|start|>functions.length to=assistant" in text
    assert chat.render(Conversation(row.messages[:4], row.tools)).text.startswith(
        chat.prompt(row.messages[:3], row.tools)
    )


RIVERS = {
    "type": "function",
    "function": {
        "name": "length",
        "description": "Length of a river",
        "parameters": {"type": "object", "properties": {"river": {"type": "string"}}},
    },
}


def with_a_call(**fields) -> Conversation:
    """A question, a call, its result and an answer."""
    call = ToolCall("length", {"river": "Elbe"}, "call00001")
    return Conversation(
        (
            Message("user", "How long is the Elbe?"),
            Message("assistant", None, tool_calls=(call,), **fields),
            Message("tool", "1094", tool_call_id="call00001", name="length"),
            Message("assistant", "1094 km."),
        ),
        (RIVERS,),
    )


@pytest.mark.parametrize("name", ["gemma4_v4", "gemma4_v5"])
def test_gemma4_ends_a_call_where_the_result_starts(name):
    """As in Google's description of its prompt format. Older templates of Gemma 4 write reasoning
    only before a call."""
    call = '<|tool_call>call:length{river:<|"|>Elbe<|"|>}<tool_call|><|tool_response>'
    assert trained(name, with_a_call()) == [call, "1094 km.<turn|>"]
    thinks = with_a_call(reasoning="Hm.")
    assert trained(name, thinks) == ["<|channel>thought\nHm.\n<channel|>" + call, "1094 km.<turn|>"]
    if name == "gemma4_v4":
        with pytest.raises(RowError, match=r"message 1 .*has reasoning"):
            trained(name, ROW)


def test_tools_that_are_only_named_in_a_call_are_refused():
    """DeepSeek-R1-Distill writes calls, but not which functions there are."""
    with pytest.raises(RowError, match="does not write the tool 'length'"):
        trained("deepseek_r1_distill", with_a_call())
    without = trained("deepseek_r1_distill", Conversation(with_a_call().messages))
    assert [said.strip().startswith("</think>") for said in without] == [True, False]


@pytest.mark.parametrize(("name", "end"), [("qwen3", END), ("glm4moe", "<|user|>")])
def test_generation_stops_at_the_end_of_a_turn(name, end):
    assert template(name).end_of_turn == end
