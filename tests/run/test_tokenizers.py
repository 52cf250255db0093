"""A run's chat template is in every output, and does not depend on the file it was read from."""

import pytest
from transformers import AutoTokenizer

from qlora_lite.data.messages import Message
from qlora_lite.data.template_shelf import SHELF
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.foundation.errors import RunError
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import small_recipe, write_rows
from tests.tiny import save_tiny

MINE = (
    "{% for m in messages %}<|role|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant: {% endif %}"
)
QUESTION = [{"role": "user", "content": "what is 1 plus 2?"}]
PROMPT = "<|role|>user: what is 1 plus 2?<|end|><|role|>assistant: "


def test_a_template_of_a_file_stays_with_the_run(tmp_path):
    base, file = save_tiny(tmp_path / "base"), tmp_path / "mine.jinja"
    file.write_text(MINE)
    recipe = small_recipe(base, write_rows(tmp_path / "rows.jsonl", 30), tmp_path / "run")
    recipe = recipe.but(f"data.template={file}", "optim.steps=2", "checkpoints.every=1")
    run_recipe(recipe)
    file.write_text(MINE.replace(": ", "> "))
    with pytest.raises(RunError, match="template"):
        run_recipe(recipe.but("optim.steps=4"), extend=True)
    file.unlink()
    loaded = load_run(tmp_path / "run")
    assert ChatTemplate(loaded.tokenizer).prompt([Message(**QUESTION[0])]) == PROMPT
    result = merge(tmp_path / "run", tmp_path / "merged", base="trained")
    assert not any("data changed" in note for note in result.notes)
    for output in ("run/adapter", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / output)
        assert tokenizer.chat_template == MINE
        assert (
            tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
            == PROMPT
        )


def test_a_template_of_the_shelf_is_in_every_output(tmp_path):
    base = save_tiny(tmp_path / "base")
    recipe = small_recipe(base, write_rows(tmp_path / "rows.jsonl", 30), tmp_path / "run")
    run_recipe(recipe.but("data.template=alpaca", "optim.steps=2"))
    result = merge(tmp_path / "run", tmp_path / "merged", base="trained")
    assert not any("data changed" in note for note in result.notes)
    for output in ("run/adapter", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / output)
        assert tokenizer.chat_template == "{{ bos_token }}" + SHELF["alpaca"].source
