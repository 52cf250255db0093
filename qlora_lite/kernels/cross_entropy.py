"""The loss of a language model without holding its logits.

    sum over trained tokens of  -log softmax(logits_of(hidden))[target]

Only trained tokens are projected, a chunk at a time. With a frozen head the gradient of the hidden
states is computed in the forward pass, so nothing of size (tokens, vocabulary) outlives its chunk
and nothing is computed twice; with a trained head each chunk is checkpointed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""Target of a token that is not trained."""

CHUNK_TOKENS = 256

LogitsOf = Callable[[Tensor], Tensor]
ExtraLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]
"""(logits, targets, rows of `beside`) -> a loss summed over the tokens; None adds nothing."""
Rows = tuple[Tensor, Tensor, Tensor | None]
"""(n, hidden), (n,) and (n, any): trained tokens, their targets and what stands beside them."""
LossOf = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The summed loss of `Rows`."""


def reference(
    hidden: Tensor,
    targets: Tensor,
    logits_of: LogitsOf,
    extra: ExtraLoss | None = None,
    beside: Tensor | None = None,
) -> Tensor:
    """The definition: all logits at once, summed cross-entropy in fp32 over targets >= 0.

    Args:
        hidden: (..., hidden); targets: (...), already shifted, `IGNORED` where not trained.
        logits_of: (tokens, hidden) -> (tokens, vocabulary), with the model's scale and soft-cap.
        extra: a further loss on the logits.
        beside: (..., any), handed to `extra` row by row with the logits.
    """
    return _loss_of(logits_of, extra)(*_trained(hidden, targets, beside))


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    logits_of: LogitsOf,
    extra: ExtraLoss | None = None,
    *,
    beside: Tensor | None = None,
    head_is_trained: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`reference` in chunks of `chunk_tokens`; at most one chunk of logits exists at a time."""
    rows = _trained(hidden, targets, beside)
    loss_of = _loss_of(logits_of, extra)
    if torch.is_grad_enabled() and not head_is_trained:
        return _FrozenHeadLoss.apply(*rows, loss_of, chunk_tokens)
    losses = [hidden.sum().float() * 0.0]  # so that no trained token at all is a loss of zero
    for chunk in _chunks(rows, chunk_tokens):
        if torch.is_grad_enabled():
            losses.append(checkpoint(loss_of, *chunk, use_reentrant=False))
        else:
            losses.append(loss_of(*chunk))
    return torch.stack(losses).sum()


class _FrozenHeadLoss(torch.autograd.Function):
    """Keeps one gradient of the shape of `hidden`, and no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        beside: Tensor | None,
        loss_of: LossOf,
        chunk_tokens: int,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        start = 0
        for chunk, t, extra_rows in _chunks((hidden, targets, beside), chunk_tokens):
            with torch.enable_grad():
                h = chunk.detach().requires_grad_()
                loss = loss_of(h, t, extra_rows)
                (gradient[start : start + len(t)],) = torch.autograd.grad(loss, h)
            total += loss.detach()
            start += len(t)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None, None


def _trained(hidden: Tensor, targets: Tensor, beside: Tensor | None) -> Rows:
    keep = targets != IGNORED
    return hidden[keep], targets[keep], None if beside is None else beside[keep]


def _chunks(rows: Rows, chunk_tokens: int) -> Iterator[Rows]:
    hidden, targets, beside = rows
    for start in range(0, len(targets), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        yield hidden[part], targets[part], None if beside is None else beside[part]


def _loss_of(logits_of: LogitsOf, extra: ExtraLoss | None) -> LossOf:
    def loss_of(hidden: Tensor, targets: Tensor, beside: Tensor | None) -> Tensor:
        logits = logits_of(hidden)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        more = extra(logits, targets, beside) if extra else None
        return loss if more is None else loss + more

    return loss_of
