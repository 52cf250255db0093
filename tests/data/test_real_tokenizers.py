"""Rows of real tokenizers: the ids of `apply_chat_template`, the answers and their ends trained."""

from dataclasses import dataclass
from functools import cache

import pytest

from qlora_lite.data.encoding import Encoded, encode, encode_text
from qlora_lite.data.formats import Document
from qlora_lite.data.jinja_templates import FIXED_DATE
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.templates import ChatTemplate
from tests.data.real_tokenizers import original_template, real_tokenizer

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
        "deepseek_v3", "deepseek_r1_distill", "<｜end▁of▁sentence｜>", num_bos=(1, 1)
    ),
    "qwen3": Case("qwen3", OWN, "<|im_end|>", opening=NO_THOUGHT, rest="\n"),
    "qwen2_5": Case("qwen3", "qwen2_5", "<|im_end|>", rest="\n"),
    "smollm2": Case("smollm2", OWN, "<|im_end|>", rest="\n", num_bos=(3, 7)),
    "gemma3": Case("gemma3", OWN, "<end_of_turn>", rest="\n", num_bos=(1, 1)),
    "gptoss": Case("gptoss", "gptoss", "<|return|>", opening="<|channel|>final<|message|>"),
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

NO_PREFIX = (RowError, "its prompt ends in a thought that the row does not have")
OTHER_END = (RowError, "only the last turn ends in the token that ends it")
TWO_FORMS = (ValueError, "an empty thought is written before the last answer alone")
MERGED = (AssertionError, "a token merges across the border of prompt and answer")

REFUSED = {("deepseek_r1", row): NO_PREFIX for row in [*ROWS, "indented"]}
REFUSED |= {("gptoss", "three questions"): OTHER_END}


def cases_and_rows(known: dict[tuple[str, str], tuple[type[Exception], str]], rows=ROWS):
    """All cases with all rows; `known` has what fails, with its error and the reason."""
    for name, case in CASES.items():
        for row, turns in rows.items():
            marks = [pytest.mark.slow] if case.tokenizer in BIG else []
            if (name, row) in known:
                error, reason = known[name, row]
                marks.append(pytest.mark.xfail(raises=error, strict=True, reason=reason))
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


def answers(turns: list[str]) -> list[str]:
    return [m.content for m in conversation(turns).messages if m.role == "assistant"]


@pytest.mark.parametrize(("case", "turns"), cases_and_rows(REFUSED))
def test_the_ids_are_those_of_apply_chat_template(case, turns):
    tokenizer = chat_template(case).tokenizer
    ids, expected = encoded(case, turns).ids, apply(case, turns)
    assert ids == expected[: len(ids)]
    assert tokenizer.decode(expected[len(ids) :]) == case.rest
    if turns in (ROWS["one question"], ROWS["three questions"]):
        written = case.num_bos[turns is ROWS["three questions"]]
        assert ids.count(tokenizer.bos_token_id) == written


@pytest.mark.parametrize(
    ("case", "turns"), cases_and_rows({**REFUSED, ("qwen3", "three questions"): TWO_FORMS})
)
def test_the_answers_and_their_ends_are_trained(case, turns):
    row = encoded(case, turns)
    text = apply(case, turns, tokenize=False).removesuffix(case.rest)
    spans = []
    for answer in answers(turns):
        trained = case.opening + answer + case.end
        start = text.index(trained, spans[-1][1] if spans else 0)
        spans.append((start, start + len(trained)))
    offsets = (
        chat_template(case)
        .tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        .offset_mapping
    )
    assert row.loss_mask == [
        any(start < last and first < end for first, last in spans) for start, end in offsets
    ]


@pytest.mark.parametrize(
    ("case", "turns"),
    [
        *cases_and_rows(REFUSED),
        *cases_and_rows(REFUSED | {("smollm2", "indented"): MERGED}, {"indented": INDENTED}),
    ],
)
def test_the_prompt_of_every_answer_is_a_prefix_of_the_row(case, turns):
    template = chat_template(case)
    messages = conversation(turns).messages
    ids = encoded(case, turns).ids
    for i, message in enumerate(messages):
        if message.role == "assistant":
            prompt = apply(case, turns[:i], add_generation_prompt=True)
            text = template.prompt(messages[:i])
            assert template.tokenizer(text, add_special_tokens=False).input_ids == prompt
            assert ids[: len(prompt)] == prompt


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
