"""Token ids and loss masks of text whose trained spans are known."""

import pytest

from qlora_lite.data.encoding import encode, encode_text
from qlora_lite.data.formats import Document
from qlora_lite.data.templates import ChatTemplate, Rendered
from tests.data.metaspace import metaspace_tokenizer
from tests.tiny import tiny_tokenizer

TEXT = "there are seven apples left 🍎 Zwölf"


@pytest.mark.parametrize("make", [tiny_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize(
    "span", [(6, 9), (8, 17), (20, 23), (27, 30), (28, 29), (30, 33), (29, 35)]
)
def test_the_trained_tokens_start_at_a_span_and_reach_its_end(make, span):
    tokenizer = make()
    (encoded,) = encode(ChatTemplate(tokenizer), [Rendered(TEXT, [span])])
    first = encoded.loss_mask.index(True)
    end = first + sum(encoded.loss_mask)
    assert encoded.loss_mask == [first <= i < end for i in range(len(encoded.ids))]
    assert encoded.ids[:first] == tokenizer(TEXT[: span[0]], add_special_tokens=False).input_ids
    assert tokenizer.decode(encoded.ids) == TEXT
    assert tokenizer.decode(encoded.ids[:end]).startswith(TEXT[: span[1]])
    assert not tokenizer.decode(encoded.ids[: end - 1]).startswith(TEXT[: span[1]])


def test_a_text_that_is_not_split_has_the_tokens_of_the_whole():
    tokenizer = tiny_tokenizer()
    (encoded,) = encode(ChatTemplate(tokenizer), [Rendered(TEXT, [(5, 11)])])
    assert encoded.ids == tokenizer(TEXT, add_special_tokens=False).input_ids


def test_with_loss_on_all_every_token_but_the_first_is_trained():
    template = ChatTemplate(tiny_tokenizer())
    spoken, silent = encode(template, [Rendered(TEXT, [(6, 9)]), Rendered(TEXT, [])], True)
    assert spoken.loss_mask == [False] + [True] * (len(spoken.ids) - 1)
    assert not any(silent.loss_mask)


def test_plain_text_is_trained_from_its_first_token_to_eos():
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(tokenizer)
    complete, part = encode_text(template, [Document("The end."), Document("The", is_end=False)])
    assert tokenizer.decode(complete.ids) == "<|begin|>The end.<|end|>"
    assert tokenizer.decode(part.ids) == "<|begin|>The"
    assert complete.loss_mask == [False] + [True] * (len(complete.ids) - 1)
