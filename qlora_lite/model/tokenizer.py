"""Load the tokenizer of a base, without its weights."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.json_files import shown
from qlora_lite.model.base_files import locate
from qlora_lite.model.config import brings_code, hub_error, unreachable
from qlora_lite.model.settings import Base
from qlora_lite.shards.gguf.header import find_gguf


def load_tokenizer(base: Base, kept: Path | None = None) -> PreTrainedTokenizerFast:
    """Load the model's tokenizer, without downloading weights.

    Args:
        kept: where the converted tokenizer of a GGUF file is kept, as in `locate`.

    Raises:
        BaseModelError: if there is none, or only a slow one.
    """
    is_gguf = find_gguf(Path(base.model)) is not None
    source = locate(base, kept).directory if is_gguf else base.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
        _try_out(tokenizer)
    except BaseException as error:
        # foreign files end in any exception; a panic of the tokenizers library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if (problem := hub_error(error)) is not None:
            raise BaseModelError(unreachable(base.model, base.revision, problem)) from error
        if "trust_remote_code" in str(error):
            raise BaseModelError(brings_code(base.model)) from error
        raise BaseModelError(
            f"base.model={base.model}: its tokenizer cannot be read "
            f"({_first_line(error)}). A tokenizer.json next to config.json is needed"
        ) from error
    if not tokenizer.is_fast:
        raise BaseModelError(
            f"base.model={base.model}: it has a slow tokenizer without tokenizer.json, and a fast "
            "one is needed. Convert it with transformers, or use another version of the model"
        )
    return tokenizer


def _try_out(tokenizer: PreTrainedTokenizerFast) -> None:
    """Use what its files set, so that a wrong type shows here.

    Raises:
        TypeError: naming the field.
    """
    templates = tokenizer.chat_template
    found = list(templates.values()) if isinstance(templates, dict) else [templates]
    if not all(text is None or isinstance(text, str) for text in found):
        raise TypeError(f"its chat_template is {shown(templates)}, and text is needed")
    ids = tokenizer("a b").input_ids
    tokenizer.decode(ids)
    special = tokenizer.special_tokens_map.values()
    if not all(isinstance(token, str | list) for token in special):
        raise TypeError("a special token is not a string")
    if templates is not None:
        tokenizer.get_chat_template()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    is_plain = isinstance(error, OSError | ValueError | TypeError)
    return lines[0] if is_plain else f"{type(error).__name__}: {lines[0]}"
