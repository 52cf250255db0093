"""The templates of the shelf, and of a file: what is trained, and which tokenizers can use them."""

import pytest

from qlora_lite.data.chosen_template import use_template
from qlora_lite.data.encoding import encode
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.template_shelf import SHELF
from qlora_lite.data.templates import ChatTemplate
from tests.data.real_tokenizers import original_template, real_tokenizer
from tests.data.trained_texts import trained_texts
from tests.tiny import tiny_tokenizer

ROW = Conversation(
    (
        Message("system", "Be brief."),
        *(Message("user", "One?"), Message("assistant", "The first.")),
        *(Message("user", "Two?"), Message("assistant", "The second.")),
    )
)
SYSTEM = "Below is an instruction that describes a task. Write a response that appropriately "
EXPECTED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n[[The first.<|im_end|>]]\n<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n[[The second.<|im_end|>]]"
    ),
    "llama3": (
        "<|begin|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nOne?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[The first.<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[The second.<|eot_id|>]]"
    ),
    "gemma": (
        "<|begin|><start_of_turn>user\nBe brief.\n\nOne?<end_of_turn>\n<start_of_turn>model\n"
        "[[The first.<end_of_turn>]]\n<start_of_turn>user\nTwo?<end_of_turn>\n"
        "<start_of_turn>model\n[[The second.<end_of_turn>]]"
    ),
    "mistral": (
        "<|begin|>[INST] Be brief.\n\nOne? [/INST][[ The first.<|end|>]]"
        "[INST] Two? [/INST][[ The second.<|end|>]]"
    ),
    "alpaca": (
        "<|begin|>Be brief.\n\n### Instruction:\nOne?\n\n### Response:\n[[The first.<|end|>]]\n\n"
        "### Instruction:\nTwo?\n\n### Response:\n[[The second.<|end|>]]"
    ),
    "plain": "<|begin|>Be brief.\nOne?\n[[The first.<|end|>]]Two?\n[[The second.<|end|>]]",
}


def tokenizer_for(name: str):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(SHELF[name].tokens)})
    return tokenizer


@pytest.mark.parametrize("name", SHELF)
def test_a_row_in_a_template_of_the_shelf(name):
    tokenizer = tokenizer_for(name)
    use_template(tokenizer, name)
    template = ChatTemplate(tokenizer)
    rendered = template.render(ROW)
    text = rendered.text
    for start, end in reversed(rendered.spans):
        text = f"{text[:start]}[[{text[start:end]}]]{text[end:]}"
    assert text == EXPECTED[name]
    (row,) = encode(template, [rendered])
    trained = trained_texts(tokenizer, row.ids, row.loss_mask)
    assert trained == [rendered.text[start:end] for start, end in rendered.spans]
    prompt = tokenizer(template.prompt(ROW.messages[:4]), add_special_tokens=False).input_ids
    assert row.ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("name", "tokenizer", "original"),
    [
        ("chatml", "smollm2", None),
        pytest.param("llama3", "llama3", "llama3", marks=pytest.mark.slow),
        pytest.param("gemma", "gemma3", "gemma", marks=pytest.mark.slow),
    ],
)
def test_the_template_of_a_family_renders_as_its_original(name, tokenizer, original):
    tokenizer = real_tokenizer(tokenizer)
    messages = [{"role": m.role, "content": m.content} for m in ROW.messages]
    messages = messages[name == "gemma" :]  # its original has no system message
    theirs = tokenizer.chat_template if original is None else original_template(original)
    for prompt in (False, True):
        mine, other = (
            tokenizer.apply_chat_template(
                messages[: 4 if prompt else 5], chat_template=t, add_generation_prompt=prompt
            )
            for t in (SHELF[name].source, theirs)
        )
        assert mine == other


def test_without_a_system_message_alpaca_has_its_own():
    tokenizer = tokenizer_for("alpaca")
    use_template(tokenizer, "alpaca")
    row = Conversation(ROW.messages[1:])
    assert ChatTemplate(tokenizer).render(row).text.startswith(f"<|begin|>{SYSTEM}completes the")
