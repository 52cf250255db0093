"""Map the tensor names of a checkpoint to those of the model.

Most names are equal. Exceptions: checkpoints saved from the bare decoder lack its prefix (GPT-2's
`h.0.attn...` is `transformer.h.0.attn...`), a tied head is stored once, old checkpoints contain
buffers that transformers now computes, and transformers renames the tensors of some families.
"""

import re
from collections.abc import Collection, Mapping

from qlora_lite.foundation.errors import BaseModelError

COMPUTED = (
    r"rotary_emb\.inv_freq$",
    r"(^|\.)attn\.(masked_)?bias$",
    r"attention\.(masked_)?bias$",
    r"(^|\.)position_ids$",
)
"""Patterns of buffers that old checkpoints contain; they are ignored."""


def match(
    stored: Collection[str],
    parameters: Collection[str],
    *,
    buffers: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
    prefix: str = "",
    ignored: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
    pieces: Collection[str] = (),
    unused: Collection[str] = (),
) -> dict[str, str]:
    """Map each stored tensor that the model uses to its name in the model.

    Tied tensors are used once. Only `pieces` may share a name.

    Args:
        parameters: names in the model; all must be found.
        buffers: names of buffers, which may be stored as well.
        tied: for each parameter that shares storage with another, the name of the other.
        prefix: the name of the decoder inside the model.
        ignored: patterns of tensors that the model's class declares as unused; of their stored
            names or of those in the model.
        renamed: the model's names of stored tensors by the rules of the model's class.
        pieces: stored tensors that are a part of a parameter.
        unused: names of tensors that the model's class has and that are not loaded.

    Raises:
        BaseModelError: if a parameter is missing, or a stored tensor is unknown; with its name.
    """
    tied, renamed = tied or {}, renamed or {}
    stored_name: dict[str, str] = {}
    unknown: list[str] = []
    parts: dict[str, str] = {}
    for name in stored:
        spellings = [renamed.get(name, name), *_spellings(name, prefix)]
        ours = next((n for n in spellings if n in parameters or n in buffers), None)
        if ours is not None and name in pieces:
            parts[name] = ours
        elif ours is not None:
            stored_name[ours] = name
        elif unused and any(n in unused for n in spellings):
            continue
        elif not any(re.search(p, n) for p in (*COMPUTED, *ignored) for n in spellings[:2]):
            unknown.append(name)
    for copy, source in tied.items():
        if source not in stored_name and copy in stored_name:
            stored_name[source] = stored_name[copy]
        stored_name.pop(copy, None)
    found = {*stored_name, *parts.values(), *tied}
    missing = [name for name in parameters if name not in found]
    if missing and unknown:
        raise BaseModelError(
            f"the checkpoint has other names than the model: it has {_shorten(unknown)}, but no "
            f"{_shorten(missing)}. Its config.json belongs to another model, or transformers "
            "cannot load it either: use a checkpoint saved by transformers"
        )
    if missing:
        raise BaseModelError(
            f"the checkpoint has no {_shorten(missing)}. It is incomplete, or its config.json "
            "belongs to another model: download it again"
        )
    if unknown:
        raise BaseModelError(
            f"the checkpoint holds {_shorten(unknown)}, which this architecture does not have. "
            "Its config.json belongs to another model, or this family stores its weights in a way "
            "that is not supported: use a checkpoint saved by transformers"
        )
    return {name: ours for ours, name in stored_name.items()} | parts


def _spellings(name: str, prefix: str) -> list[str]:
    """A stored name as it is, with the prefix added, and with the prefix removed."""
    if not prefix:
        return [name]
    return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]


def _shorten(names: list[str]) -> str:
    """The first three names."""
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
