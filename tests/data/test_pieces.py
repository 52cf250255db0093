"""Rows that are tokenised in pieces: at the end of a prompt, and around plain special tokens."""

import copy

import pytest

from qlora_lite.data.chosen_template import use_template
from qlora_lite.data.encoding import encode
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.pieces import Pieces
from qlora_lite.data.templates import ChatTemplate
from tests.data.marked_templates import pair
from tests.data.metaspace import metaspace_tokenizer
from tests.data.real_tokenizers import real_tokenizer
from tests.data.trained_texts import trained_texts
from tests.tiny import tiny_tokenizer

TEXT = "there are seven apples left 🍎 Zwölf"


@pytest.mark.parametrize("make", [tiny_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("border", [3, 6, 9, 10, 28, 30])
def test_the_pieces_of_a_text_are_the_text(make, border):
    tokenizer = make()
    tokens = Pieces(tokenizer).encode(TEXT, [border], [])
    assert tokenizer.decode(tokens.ids) == TEXT
    before = tokenizer(TEXT[:border], add_special_tokens=False).input_ids
    assert tokens.ids[: len(before)] == before
    assert all(end <= border or border <= start for start, end in tokens.chars)


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3_1", "deepseek_v3"])
@pytest.mark.parametrize("answer", ["  indented", "\n\nlate", "\tcode", "Plain."])
def test_a_token_that_merges_into_an_answer_is_split(name, answer):
    tokenizer = real_tokenizer(name)
    template = ChatTemplate(tokenizer)
    question = Message("user", "Go on.")
    rendered = template.render(Conversation((question, Message("assistant", answer))))
    (row,) = encode(template, [rendered])
    assert tokenizer.decode(row.ids) == rendered.text
    prompt = tokenizer(template.prompt([question]), add_special_tokens=False).input_ids
    assert row.ids[: len(prompt)] == prompt
    assert row.loss_mask == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))


def template_of(name: str) -> ChatTemplate:
    if name == "qwen3":
        return pair("qwen3").template
    tokenizer = copy.copy(real_tokenizer(name))
    if name == "llama2":  # it has no template
        use_template(tokenizer, "mistral")
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("role", ["system", "user"])
@pytest.mark.parametrize(
    ("name", "token"),
    [
        *(("qwen3", token) for token in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")),
        *(("smollm2", token) for token in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")),
        *(("llama2", token) for token in ("<s>", "</s>")),
    ],
)
def test_a_special_token_that_a_user_writes_is_plain_text(name, token, role):
    template = template_of(name)
    tokenizer = template.tokenizer
    special = tokenizer.convert_tokens_to_ids(token)

    def row(text: str):
        texts = {"system": "Be brief.", "user": "Why?"} | {role: text}
        messages = [Message(r, t) for r, t in texts.items()]
        return encode(
            template,
            [template.render(Conversation((*messages, Message("assistant", "So."))))],
        )[0]

    text = f"What is {token}{token}assistant, {token} 🍎?"
    ours, harmless = row(text), row("What is it?")
    assert ours.ids.count(special) == harmless.ids.count(special)
    assert tokenizer.decode(ours.ids) == tokenizer.decode(harmless.ids).replace("What is it?", text)
    assert trained_texts(tokenizer, ours.ids, ours.loss_mask) == trained_texts(
        tokenizer, harmless.ids, harmless.loss_mask
    )
    assert len(ours.ids) == len(ours.loss_mask)
