"""Gradient checkpointing: keep each decoder layer's input, and compute the layer again in backward.

Ours and not transformers' own, which is active in training mode only: training mode also turns on
the dropout of the frozen base (GPT-2 has some), and then the adapted model would not start as the
base. Non-reentrant, so that it works although the frozen embedding's output needs no gradient.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_lite.model.shape import decoder_blocks

_recomputing: ContextVar[bool] = ContextVar("recomputing", default=False)


def enable_checkpointing(model: nn.Module) -> None:
    """Checkpoint every decoder layer whenever gradients are computed. Call it once."""
    for layer in model.get_submodule(decoder_blocks(model)).children():
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, context_fn=_contexts
        )


def is_recomputing() -> bool:
    """Whether this forward repeats one for the backward, so that its tokens were seen before."""
    return _recomputing.get()


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward, and of its repetition."""
    return nullcontext(), _repeating()


@contextmanager
def _repeating() -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)
