"""The loss of a language model without holding its logits.

    sum over trained tokens of  -log softmax(logits_of(hidden))[target]

Only trained tokens are projected, a chunk at a time. With a frozen head the gradient of the hidden
states is computed in the forward pass, so nothing of size (tokens, vocabulary) outlives its chunk
and nothing is computed twice; with a trained head each chunk is checkpointed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Target of a token that is not trained."""

CHUNK_TOKENS = 256

LogitsOf = Callable[[Tensor], Tensor]
ExtraLoss = Callable[[Tensor, Tensor], Tensor | None]


def reference(
    hidden: Tensor, targets: Tensor, logits_of: LogitsOf, extra: ExtraLoss | None = None
) -> Tensor:
    """The definition: all logits at once, summed cross-entropy in fp32 over targets >= 0.

    Args:
        hidden: (..., hidden); targets: (...), already shifted, `IGNORED` where not trained.
        logits_of: (tokens, hidden) -> (tokens, vocabulary), with the model's scale and soft-cap.
        extra: a further loss on (logits, targets), summed over the tokens; None adds nothing.
    """
    hidden, targets = _trained(hidden, targets)
    return _chunk_loss(hidden, targets, logits_of, extra)


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    logits_of: LogitsOf,
    extra: ExtraLoss | None = None,
    *,
    head_is_trained: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`reference` in chunks of `chunk_tokens`; at most one chunk of logits exists at a time."""
    hidden, targets = _trained(hidden, targets)
    if not torch.is_grad_enabled():
        return _sum_of_chunks(hidden, targets, logits_of, extra, chunk_tokens)
    if head_is_trained:
        losses = [
            checkpoint(_chunk_loss, h, t, logits_of, extra, use_reentrant=False)
            for h, t in _chunks(hidden, targets, chunk_tokens)
        ]
        return torch.stack(losses).sum() if losses else hidden.sum() * 0.0
    return _FrozenHeadLoss.apply(hidden, targets, logits_of, extra, chunk_tokens)


class _FrozenHeadLoss(torch.autograd.Function):
    """Keeps one gradient of the shape of `hidden`, and no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        logits_of: LogitsOf,
        extra: ExtraLoss | None,
        chunk_tokens: int,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        start = 0
        for chunk, t in _chunks(hidden, targets, chunk_tokens):
            with torch.enable_grad():
                h = chunk.detach().requires_grad_()
                loss = _chunk_loss(h, t, logits_of, extra)
                (gradient[start : start + len(t)],) = torch.autograd.grad(loss, h)
            total += loss.detach()
            start += len(t)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None, None


def _trained(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the trained tokens: (n, hidden) and (n,)."""
    keep = targets != IGNORED
    return hidden[keep], targets[keep]


def _chunks(hidden: Tensor, targets: Tensor, chunk_tokens: int) -> list[tuple[Tensor, Tensor]]:
    if not len(targets):
        return []
    return list(zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True))


def _chunk_loss(
    hidden: Tensor, targets: Tensor, logits_of: LogitsOf, extra: ExtraLoss | None
) -> Tensor:
    logits = logits_of(hidden)
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    more = extra(logits, targets) if extra else None
    return loss if more is None else loss + more


def _sum_of_chunks(
    hidden: Tensor,
    targets: Tensor,
    logits_of: LogitsOf,
    extra: ExtraLoss | None,
    chunk_tokens: int,
) -> Tensor:
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, t in _chunks(hidden, targets, chunk_tokens):
        total += _chunk_loss(h, t, logits_of, extra)
    return total
