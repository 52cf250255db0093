"""Rows of real tokenizers: the ids of `apply_chat_template`, the answers and their ends trained."""

from dataclasses import dataclass
from functools import cache

import pytest

from qlora_lite.data.encoding import Encoded, encode, encode_text
from qlora_lite.data.formats import Document
from qlora_lite.data.jinja_templates import FIXED_DATE
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.templates import ChatTemplate
from tests.data.real_tokenizers import original_template, real_tokenizer
from tests.data.trained_texts import trained_texts

OWN, PLAIN = "own", "plain"
# a BOS for every question, as Llama 2 was trained
TURNS_WITH_BOS = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ m.role }}: {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
NO_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Case:
    """A tokenizer with a chat template.

    `template` is `OWN` or `PLAIN`, the name of an original template, or a template.
    """

    tokenizer: str
    template: str
    end: str
    opening: str = ""
    """What the prompt leaves to the model to write before its answer."""
    inner_end: str | None = None
    """The end of an answer that is not the last one, if it is another."""
    keeps_turns: bool = True
    """Whether the template writes an answer in the same form when other messages follow, and does
    not leave out the end of its prompt. Otherwise the row is not the rendered conversation."""
    rest: str = ""
    """What the template writes after the last end of turn."""
    num_bos: tuple[int, int] = (0, 0)
    """In a row of one and of three questions."""


CASES = {
    "llama2 plain": Case("llama2", PLAIN, "</s>", num_bos=(1, 1)),
    "llama2 turns with bos": Case("llama2", TURNS_WITH_BOS, " </s>", opening=" ", num_bos=(1, 3)),
    "llama3": Case(
        "llama3",
        OWN,
        "<|eot_id|>",
        rest="<|start_header_id|>assistant<|end_header_id|>\n\n",
        num_bos=(1, 1),
    ),
    "llama3_1": Case("llama3_1", OWN, "<|eot_id|>", num_bos=(1, 1)),
    "llama3_1 original": Case("llama3_1", "llama3_1", "<|eot_id|>", num_bos=(1, 1)),
    "llama3_2": Case("llama3_1", "llama3_2", "<|eot_id|>", num_bos=(1, 1)),
    "deepseek_v3": Case("deepseek_v3", OWN, "<｜end▁of▁sentence｜>", num_bos=(1, 1)),
    "deepseek_r1": Case(
        "deepseek_v3",
        "deepseek_r1_distill",
        "<｜end▁of▁sentence｜>",
        opening="\n</think>\n\n",
        num_bos=(1, 1),
        keeps_turns=False,
    ),
    "qwen3": Case("qwen3", OWN, "<|im_end|>", opening=NO_THOUGHT, rest="\n", keeps_turns=False),
    "qwen2_5": Case("qwen3", "qwen2_5", "<|im_end|>", rest="\n"),
    "smollm2": Case("smollm2", OWN, "<|im_end|>", rest="\n", num_bos=(3, 7)),
    "gemma3": Case("gemma3", OWN, "<end_of_turn>", rest="\n", num_bos=(1, 1)),
    "gptoss": Case(
        "gptoss",
        "gptoss",
        "<|return|>",
        opening="<|channel|>final<|message|>",
        inner_end="<|end|>",
    ),
    "gptoss plain": Case("gptoss", PLAIN, "<|return|>"),
}
BIG = {"gemma3", "gptoss"}
"""Tokenizers of 28 and 33 MB."""

ROWS = {
    "one question": ["user: How many apples?", "assistant: Seven — sieben Äpfel 🍎.\n\nNo more."],
    "three questions": [
        *("user: One?", "assistant: The first.", "user: Two?", "assistant: The second one."),
        *("user: Three?", "assistant: 苹果"),
    ],
    "system": ["system: Be brief.", "user: Why?", "assistant: Because."],
    "empty system": ["system: ", "user: Why?", "assistant: Because."],
}
INDENTED = ["user: Code?", "assistant:    return 1\n"]


def cases_and_rows(rows=ROWS, keeps_turns: bool = False):
    """All cases with all rows. With `keeps_turns`, those whose row is the rendered conversation."""
    for name, case in CASES.items():
        for row, turns in rows.items():
            if case.keeps_turns or not keeps_turns:
                marks = [pytest.mark.slow] if case.tokenizer in BIG else []
                yield pytest.param(case, turns, marks=marks, id=f"{name}, {row}")


@cache
def chat_template(case: Case) -> ChatTemplate:
    tokenizer = real_tokenizer(case.tokenizer)
    own = tokenizer.chat_template
    named = {OWN: own, PLAIN: None, TURNS_WITH_BOS: TURNS_WITH_BOS}
    known = case.template in named
    tokenizer.chat_template = named[case.template] if known else original_template(case.template)
    try:
        return ChatTemplate(tokenizer)
    finally:
        tokenizer.chat_template = own


def conversation(turns: list[str]) -> Conversation:
    return Conversation(tuple(Message(*turn.split(": ", 1)) for turn in turns))


def encoded(case: Case, turns: list[str]) -> Encoded:
    template = chat_template(case)
    (row,) = encode(template, [template.render(conversation(turns))])
    return row


def apply(case: Case, turns: list[str], **options):
    """What transformers makes of a row, on the same date."""
    template = chat_template(case)
    dated = "strftime_now" in template.source
    return template.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in conversation(turns).messages],
        chat_template=FIXED_DATE + template.source if dated else template.source,
        return_dict=False,
        **options,
    )


def is_trimmed(case: Case) -> bool:
    """Whether the template strips the text of a message."""
    return case.tokenizer in ("llama3", "llama3_1", "gemma3")


def answers(turns: list[str]) -> list[str]:
    return [m.content for m in conversation(turns).messages if m.role == "assistant"]


@pytest.mark.parametrize(("case", "turns"), cases_and_rows(keeps_turns=True))
def test_the_ids_are_those_of_apply_chat_template(case, turns):
    tokenizer = chat_template(case).tokenizer
    ids, expected = encoded(case, turns).ids, apply(case, turns)
    assert ids == expected[: len(ids)]
    assert tokenizer.decode(expected[len(ids) :]) == case.rest
    if turns in (ROWS["one question"], ROWS["three questions"]):
        written = case.num_bos[turns is ROWS["three questions"]]
        assert ids.count(tokenizer.bos_token_id) == written


@pytest.mark.parametrize(("case", "turns"), cases_and_rows(ROWS | {"indented": INDENTED}))
def test_the_answers_and_their_ends_are_trained(case, turns):
    row, tokenizer = encoded(case, turns), chat_template(case).tokenizer
    texts = [text.strip() if is_trimmed(case) else text for text in answers(turns)]
    ends = [case.inner_end or case.end] * (len(texts) - 1) + [case.end]
    expected = [case.opening + text + end for text, end in zip(texts, ends, strict=True)]
    assert trained_texts(tokenizer, row.ids, row.loss_mask) == expected


@pytest.mark.parametrize(("case", "turns"), cases_and_rows(ROWS | {"indented": INDENTED}))
def test_the_prompt_of_an_answer_is_a_prefix_of_the_row(case, turns):
    template = chat_template(case)
    messages = conversation(turns).messages
    ids = encoded(case, turns).ids
    for i, message in enumerate(messages):
        if message.role == "assistant":
            prompt = apply(case, turns[:i], add_generation_prompt=True)
            text = template.prompt(messages[:i])
            assert template.tokenizer(text, add_special_tokens=False).input_ids == prompt
            assert ids[: len(prompt)] == prompt
            if not case.keeps_turns:
                break  # the prompts of later answers have the earlier ones in another form


@pytest.mark.parametrize(
    ("name", "adds_bos"),
    [
        ("llama2", True),
        ("llama3", False),
        ("llama3_1", True),
        ("deepseek_v3", False),
        ("qwen3", False),
        ("smollm2", False),
        pytest.param("gemma3", True, marks=pytest.mark.slow),
        pytest.param("gptoss", False, marks=pytest.mark.slow),
    ],
)
def test_a_text_gets_what_the_tokenizer_adds_and_eos(name, adds_bos):
    tokenizer = real_tokenizer(name)
    text = "The end — Äpfel 🍎\n"
    (row,) = encode_text(ChatTemplate(tokenizer), [Document(text)])
    assert row.ids == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert row.ids.count(tokenizer.bos_token_id) == adds_bos
