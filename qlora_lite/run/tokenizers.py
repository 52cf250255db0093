"""The tokenizer of a run, with the chat template that it trains."""

from transformers import PreTrainedTokenizerFast

from qlora_lite.data.chosen_template import use_template
from qlora_lite.data.template_shelf import SHELF
from qlora_lite.model.tokenizer import load_tokenizer
from qlora_lite.recipe import Recipe
from qlora_lite.run.folder import RunFolder


def tokenizer_to_train(recipe: Recipe, folder: RunFolder | None = None) -> PreTrainedTokenizerFast:
    """The base's tokenizer, with `data.template` if it is set."""
    tokenizer = load_tokenizer(recipe.base, None if folder is None else folder.base_files)
    if recipe.data.template is not None:
        use_template(tokenizer, recipe.data.template)
    return tokenizer


def trained_tokenizer(recipe: Recipe, folder: RunFolder) -> PreTrainedTokenizerFast:
    """The tokenizer of a run with an adapter. A file of `data.template` is read from the adapter,
    which has a copy: the file may have changed since."""
    tokenizer = load_tokenizer(recipe.base, folder.base_files)
    template = recipe.data.template
    if template is not None:
        is_file = template not in SHELF
        saved = folder.adapter / "chat_template.jinja"
        use_template(tokenizer, str(saved) if is_file else template)
    return tokenizer
