"""Gradient checkpointing: store each decoder layer's input, and recompute the layer in backward.

Transformers' own checkpointing is only active in training mode, which also turns on the dropout of
the frozen base (GPT-2 has some), so that the first output would differ from the base's.
Non-reentrant, because the output of the frozen embedding does not require a gradient.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
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


def before_each_layer(
    model: nn.Module, action: Callable[[], None], *, in_backward: bool = False
) -> None:
    """Call `action` whenever a decoder layer runs forward for gradients, recomputations included.

    Call this before `enable_checkpointing`.

    Args:
        in_backward: also before the backward of each layer, where nothing is recomputed.
    """
    for layer in model.get_submodule(decoder_blocks(model)).children():
        layer.forward = functools.partial(_after, action, in_backward, layer.forward)


def _after(
    action: Callable[[], None],
    in_backward: bool,
    forward: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    action()
    output = forward(*args, **kwargs)
    hidden = output[0] if isinstance(output, tuple) else output
    if in_backward and hidden.requires_grad:  # not below the first trained layer
        hidden.register_hook(lambda _: action())
    return output


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
