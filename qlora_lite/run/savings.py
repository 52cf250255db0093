"""Recipe settings that need less memory, for a recipe that does not fit.

Ordered by their effect on the result: none first, largest last.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qlora_lite.memory.ledger import RunShape
from qlora_lite.memory.plan import Alternative

MIN_SUGGESTED_TOKENS = 256
"""The smallest `data.max_tokens` that is suggested."""


def alternatives(run: RunShape) -> Iterator[Alternative]:
    """Settings that could be changed, those that affect the result least first."""
    if (run.micro_batch_tokens or 0) >= 2 * run.max_tokens:
        yield _set("optim.micro_batch_tokens", run.max_tokens, micro_batch_tokens=run.max_tokens)
    if not run.checkpointing:
        yield _set("optim.checkpointing", "true", checkpointing=True)
    if run.device == "cuda" and run.states == "32bit" and run.zero is None:
        yield _set("optim.states", "8bit", states="8bit")
    four_bit = run.quant in ("nf4", "fp4")
    if four_bit and not run.double_quant:
        yield _set("base.quant.double_quant", "true", double_quant=True)
    if not four_bit:
        yield _set("base.quant", "nf4", quant="nf4", double_quant=True, block_size=64)
    if run.rank > 1:
        rank = run.rank // 2
        smaller = {path: f.scaled(rank / run.rank) for path, f in run.adapters.items()}
        yield _set("adapter.rank", rank, adapters=smaller, rank=rank)
    if run.head != "nf4":
        yield _set("base.head", "nf4", head="nf4")
    max_tokens = run.max_tokens // 2
    while max_tokens >= MIN_SUGGESTED_TOKENS:
        yield _set("data.max_tokens", max_tokens, max_tokens=max_tokens)
        max_tokens //= 2


def _set(field: str, value: object, **changes: Any) -> Alternative:
    return Alternative(field, str(value), lambda run: replace(run, **changes))
