"""Give a tokenizer the template of `data.template`: a name of the shelf, or a jinja file.

It is saved with the tokenizer in every output. No token is added: a name whose tokens the tokenizer
lacks is refused.
"""

import difflib
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_lite.data.template_shelf import SHELF
from qlora_lite.data.templates import adds_bos
from qlora_lite.foundation.errors import DataError


def use_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Give a tokenizer the chat template of `data.template`.

    Raises:
        DataError: if there is no such name or file, or the tokenizer lacks its tokens.
    """
    if template not in SHELF:
        tokenizer.chat_template = _read(template)
        return
    known = SHELF[template]
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in known.tokens if token not in vocabulary]
    if missing:
        fitting = [name for name in SHELF if all(t in vocabulary for t in SHELF[name].tokens)]
        raise DataError(
            f"data.template={template} needs the token {missing[0]}, which the tokenizer does not "
            f"have. With this base these work: {', '.join(fitting)}"
        )
    has_bos = known.is_text and adds_bos(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" * has_bos + known.source if known.source else None


def _read(template: str) -> str:
    path = Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        near = difflib.get_close_matches(template, SHELF, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise DataError(
            f"data.template={template} cannot be read: {reason}.{hint} Give a jinja file, or one "
            f"of {', '.join(SHELF)}"
        ) from None
