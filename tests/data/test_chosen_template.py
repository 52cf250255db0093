"""A tokenizer gets the template of `data.template`, or it is said why it cannot."""

import copy

import pytest

from qlora_lite.data.chosen_template import use_template
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.template_shelf import SHELF
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.foundation.errors import DataError
from tests.data.real_tokenizers import real_tokenizer
from tests.tiny import tiny_tokenizer

ROW = Conversation((Message("user", "One?"), Message("assistant", "The first.")))


def test_a_template_whose_tokens_are_missing_is_refused():
    with pytest.raises(DataError, match=r"<\|im_start\|>, which .* work: mistral, alpaca, plain"):
        use_template(tiny_tokenizer(), "chatml")


def test_a_template_of_text_has_a_bos_only_if_texts_have_one():
    tokenizer = copy.copy(real_tokenizer("smollm2"))
    assert tokenizer.bos_token is not None
    use_template(tokenizer, "alpaca")
    assert tokenizer.chat_template == SHELF["alpaca"].source


def test_a_file_is_a_template(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer = tiny_tokenizer()
    use_template(tokenizer, str(file))
    rendered = ChatTemplate(tokenizer).render(ROW)
    assert rendered.text.startswith("user> One?<|end|>assistant> The first")
    with pytest.raises(DataError, match=r"chatlm cannot be read.*Did you mean 'chatml'\?"):
        use_template(tokenizer, "chatlm")
