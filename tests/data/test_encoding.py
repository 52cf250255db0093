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
def test_a_token_is_trained_if_any_of_its_characters_is_in_a_span(make, span):
    tokenizer = make()
    (encoded,) = encode(ChatTemplate(tokenizer), [Rendered(TEXT, [span])])
    offsets = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    expected = [start < span[1] and span[0] < end for start, end in offsets]
    assert encoded.loss_mask == [False, *expected[1:]]


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
