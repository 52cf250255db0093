"""Gradient checkpointing: store each decoder layer's input, and recompute the layer in backward.

Transformers' own checkpointing is only active in training mode, which also turns on the dropout of
the frozen base (GPT-2 has some), so that the first output would differ from the base's.
Non-reentrant, because the output of the frozen embedding does not require a gradient.
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
    """Whether this forward is a recomputation in backward, of tokens that were counted before."""
    return _recomputing.get()


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the forward and of its recomputation."""
    return nullcontext(), _recomputation()


@contextmanager
def _recomputation() -> Iterator[None]:
    token = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(token)
