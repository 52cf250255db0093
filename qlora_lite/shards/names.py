"""Which tensor of a checkpoint is which tensor of the model.

Names agree as a rule. Exceptions: checkpoints saved from the bare decoder lack its prefix (GPT-2's
`h.0.attn...` is `transformer.h.0.attn...`), a tied head is stored once, and old checkpoints hold
buffers that are computed today.
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
"""Buffers of old checkpoints."""


def match(
    stored: Collection[str],
    parameters: Collection[str],
    *,
    buffers: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
    prefix: str = "",
    ignored: Collection[str] = (),
) -> dict[str, str]:
    """The model's name for every stored tensor that it uses; of tied tensors one is used.

    Args:
        parameters: names in the model; all must be found.
        buffers: names that may be stored.
        tied: for each parameter that shares another's storage, that other's name.
        prefix: the name of the decoder inside the model.
        ignored: patterns that the model's own code says it does not read.

    Raises:
        BaseModelError: naming what is missing or what nobody knows.
    """
    tied = tied or {}
    found: dict[str, str] = {}
    unknown: list[str] = []
    for name in stored:
        ours = next((n for n in _spellings(name, prefix) if n in parameters or n in buffers), None)
        if ours is not None:
            found[ours] = name
        elif not any(re.search(pattern, name) for pattern in (*COMPUTED, *ignored)):
            unknown.append(name)
    for copy, source in tied.items():
        if source not in found and copy in found:
            found[source] = found[copy]
        found.pop(copy, None)
    missing = [name for name in parameters if name not in found and name not in tied]
    if missing:
        raise BaseModelError(
            f"the checkpoint has no {_some(missing)}. It is incomplete, or its config.json belongs "
            "to another model: download it again"
        )
    if unknown:
        raise BaseModelError(
            f"the checkpoint holds {_some(unknown)}, which this architecture does not have. "
            "Its config.json belongs to another model, or this family stores its weights in a way "
            "that is not supported: take a checkpoint saved by transformers"
        )
    return {name: ours for ours, name in found.items()}


def _spellings(name: str, prefix: str) -> list[str]:
    if not prefix:
        return [name]
    return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
