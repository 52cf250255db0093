"""The trained tokens decode to the assistant's messages, each with its end-of-turn token."""

from dataclasses import dataclass, replace

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.encoding import encode
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.templates import ChatTemplate, Rendered
from qlora_lite.foundation.errors import DataError
from tests.data.metaspace import metaspace_tokenizer
from tests.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Style:
    """A chat template, its special tokens, and the trained text for the answer `{}`."""

    template: str | None
    tokens: tuple[str, ...]
    trained: str


CHATML = Style(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    "{}<|im_end|>",
)
HEADERS = Style(
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
    ("<|head|>", "<|/head|>", "<|eot|>"),
    "{}<|eot|>",
)
BRACKETS = Style(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system message here') }}{% endif %}{% endfor %}",
    (),
    " {}<|end|>",
)
MARKED = Style(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    "{}<|im_end|>",
)
MARKED_WITHOUT_END = replace(
    MARKED,
    template=MARKED.template.replace(
        "<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"
    ),
)
TWO_ENDS = Style(
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ("<|user|>", "<|assistant|>", "<|system|>", "<|stop|>"),
    "{}<|stop|>",
)
# an empty reasoning block before the last answer, none before the earlier ones
REASONING = Style(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    "<think>\n\n</think>\n\n{}<|im_end|>",
)
PLAIN = Style(None, (), "{}<|end|>")

STYLES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "brackets": BRACKETS,
    "marked": MARKED,
    "marked without end": MARKED_WITHOUT_END,
    "two ends": TWO_ENDS,
    "reasoning": REASONING,
    "plain": PLAIN,
}

ANSWERS = [
    "There are seven apples left.",
    "Zwölf — naïve 苹果 🍎",
    "two\n\nparagraphs\n  and indented",
    "user\nassistant\n[OUT]",
]


def styled(style: Style) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(style.tokens)})
    tokenizer.chat_template = style.template
    return tokenizer


def talk(*turns: str, system: str | None = None) -> Conversation:
    roles = ["user", "assistant"] * len(turns)
    messages = [Message(role, text) for role, text in zip(roles, turns, strict=False)]
    return Conversation((*([Message("system", system)] if system else []), *messages))


def trained_runs(tokenizer, encoded) -> list[str]:
    """The text of every unbroken run of trained tokens."""
    runs: list[list[int]] = []
    was_trained = False
    for token, is_trained in zip(encoded.ids, encoded.loss_mask, strict=True):
        if is_trained and not was_trained:
            runs.append([])
        if is_trained:
            runs[-1].append(token)
        was_trained = is_trained
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_trained_tokens_decode_to_the_answer_and_its_end(style, answer):
    tokenizer = styled(style)
    template = ChatTemplate(tokenizer)
    (encoded,) = encode(template, [template.render(talk("How many apples are left?", answer))])
    assert trained_runs(tokenizer, encoded) == [style.trained.format(answer)]


@pytest.mark.parametrize(
    "style", [CHATML, HEADERS, BRACKETS, MARKED, MARKED_WITHOUT_END, TWO_ENDS, PLAIN]
)
def test_every_answer_of_a_conversation_is_trained(style):
    tokenizer = styled(style)
    template = ChatTemplate(tokenizer)
    conversation = talk("One?", "One.", "Two?", "One.", "Two?", "Three\nlines.\n\nTwo.")
    (encoded,) = encode(template, [template.render(conversation)])
    expected = [style.trained.format(a) for a in ("One.", "One.", "Three\nlines.\n\nTwo.")]
    assert trained_runs(tokenizer, encoded) == expected


@pytest.mark.parametrize("style", [BRACKETS, PLAIN], ids=["brackets", "plain"])
@pytest.mark.parametrize("answer", ["there are seven apples left", "Zwölf 🍎", "one\n\n two"])
def test_the_trained_text_is_the_same_if_a_space_is_part_of_the_next_token(style, answer):
    tokenizer = metaspace_tokenizer()
    tokenizer.chat_template = style.template
    template = ChatTemplate(tokenizer)
    (encoded,) = encode(template, [template.render(talk("how many", answer))])
    (trained,) = trained_runs(tokenizer, encoded)
    assert trained.lstrip() == f"{answer}</s>"
    assert encoded.ids.count(tokenizer.bos_token_id) == 1


ONE_FORM = {name: style for name, style in STYLES.items() if style is not REASONING}
"""Those that write an answer in the same form when other messages follow."""


@pytest.mark.parametrize("style", ONE_FORM.values(), ids=ONE_FORM)
def test_a_row_equals_apply_chat_template_up_to_the_last_end_of_turn(style):
    tokenizer = styled(style)
    template = ChatTemplate(tokenizer)
    conversation = talk("One?", "One.", "Two?", "Two.")
    (encoded,) = encode(template, [template.render(conversation)])
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=template.source, return_dict=False
    )
    assert encoded.ids == expected[: len(encoded.ids)]
    assert encoded.ids[-1] == template.end_of_turn_id
    assert encoded.loss_mask[-1]
    assert template.end_of_turn_id not in expected[len(encoded.ids) :]


@pytest.mark.parametrize("style", ONE_FORM.values(), ids=ONE_FORM)
def test_the_prompt_is_a_prefix_of_the_row(style):
    template = ChatTemplate(styled(style))
    conversation = talk("One?", "One.", "Two?", "Two.")
    prompt = template.prompt(conversation.messages[:3])
    assert template.render(conversation).text.startswith(prompt)


@pytest.mark.parametrize(
    ("style", "end"),
    [(CHATML, "<|im_end|>"), (HEADERS, "<|eot|>"), (BRACKETS, "<|end|>"), (TWO_ENDS, "<|stop|>")],
)
def test_the_end_of_turn_is_found_in_the_template(style, end):
    tokenizer = styled(style)
    template = ChatTemplate(tokenizer)
    assert template.end_of_turn == end
    assert tokenizer.convert_ids_to_tokens(template.end_of_turn_id) == end


def test_a_template_without_an_end_gets_eos_at_the_end_of_the_row():
    tokenizer = styled(
        Style("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", (), "")
    )
    template = ChatTemplate(tokenizer)
    (encoded,) = encode(template, [template.render(talk("One?", "Two."))])
    assert tokenizer.decode(encoded.ids) == "user: One?\nassistant: Two.<|end|>"
    assert trained_runs(tokenizer, encoded) == ["assistant: Two.<|end|>"]
    with pytest.raises(RowError, match="does not close message 1"):
        template.render(talk("One?", "Two.", "Three?", "Four."))


def said(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_every_answer_has_the_form_of_the_last_one():
    rendered = ChatTemplate(styled(REASONING)).render(talk("One?", "One.", "Two?", "Two."))
    assert said(rendered) == [REASONING.trained.format("One."), REASONING.trained.format("Two.")]
    assert rendered.text == (
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nOne."
        "<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\nTwo.<|im_end|>"
    )


def test_reasoning_that_the_template_drops_is_refused():
    template = ChatTemplate(styled(REASONING))
    row = talk("One?", "<think>\nhm\n</think>\n\nOne.", "Two?", "<think>\noh\n</think>\n\nTwo.")
    with pytest.raises(RowError, match=r"message 1 .* reasoning, .*data\.reasoning=drop"):
        template.render(row)
    assert said(template.render(row, "drop")) == [
        REASONING.trained.format("One."),
        REASONING.trained.format("Two."),
    ]


def test_an_answer_that_the_template_changes_is_counted():
    brief = CHATML.template.replace("m.content", "m.content.replace('One', '1')")
    template = ChatTemplate(styled(replace(CHATML, template=brief)))
    assert template.render(talk("1?", "One.", "Two?", "Two.")).num_rewritten == 1


def test_a_template_that_rewrites_the_prompt_is_refused():
    late = Style(
        "{% for m in messages %}{{ messages | length }}<|im_start|>{{ m.content }}<|im_end|>"
        "{% endfor %}",
        ("<|im_start|>", "<|im_end|>"),
        "",
    )
    with pytest.raises(RowError, match="differently when the message follows"):
        ChatTemplate(styled(late)).render(talk("One?", "Two."))


def test_an_answer_without_an_end_of_turn_is_refused():
    only_last = Style(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|im_end|>{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "",
    )
    template = ChatTemplate(styled(only_last))
    assert template.render(talk("One?", "Two.")).spans
    with pytest.raises(RowError, match="does not close message 1"):
        template.render(talk("One?", "Two.", "Three?", "Four."))


def test_an_answer_that_the_template_leaves_out_is_not_trained():
    terse = replace(CHATML, template=CHATML.template.replace("content", "content.split('>>')[-1]"))
    template = ChatTemplate(styled(terse))
    rendered = template.render(talk("One?", "hm>>"))
    assert rendered.spans == []
    for everything in (False, True):
        (encoded,) = encode(template, [rendered], everything)
        assert not any(encoded.loss_mask)


def test_a_template_that_leaves_every_answer_out_is_refused():
    silent = replace(CHATML, template=CHATML.template.replace("m.content", "m.role"))
    with pytest.raises(DataError, match="leaves out the assistant's message"):
        ChatTemplate(styled(silent))


def test_the_error_of_a_template_is_in_the_message():
    template = ChatTemplate(styled(BRACKETS))
    with pytest.raises(RowError, match="no system message here"):
        template.render(talk("One?", "Two.", system="Be brief."))


def test_a_date_in_the_template_is_the_same_every_day():
    dated = replace(CHATML, template="{{ strftime_now('%d %b %Y') }}\n" + CHATML.template)
    assert ChatTemplate(styled(dated)).render(talk("a", "b")).text.startswith("26 Jul 2024\n<|im")


def test_without_a_chat_template_a_row_is_prompt_completion_and_eos():
    tokenizer = styled(PLAIN)
    template = ChatTemplate(tokenizer)
    (encoded,) = encode(template, [template.render(talk("One?", "Two."))])
    assert tokenizer.decode(encoded.ids) == "<|begin|>One?\nTwo.<|end|>"
    assert len(tokenizer) == len(tiny_tokenizer())


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        ChatTemplate(tokenizer)
