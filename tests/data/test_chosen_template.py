"""A tokenizer gets the template of `data.template`, or it is said why it cannot."""

import pytest

from qlora_lite.data.chosen_template import use_template
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.foundation.errors import DataError
from tests.tiny import tiny_tokenizer

ROW = Conversation((Message("user", "One?"), Message("assistant", "The first.")))


def test_a_template_whose_tokens_are_missing_is_refused():
    with pytest.raises(DataError, match=r"<\|im_start\|>, which .* work: mistral, alpaca, plain"):
        use_template(tiny_tokenizer(), "chatml")


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
