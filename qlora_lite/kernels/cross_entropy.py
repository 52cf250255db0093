"""Cross-entropy of a language model without storing all logits.

    sum over trained tokens of  -log softmax(logits_of(hidden))[target]

Only trained tokens are projected to logits, one chunk at a time. With a frozen head, the gradient
of the hidden states is computed in the forward pass: no tensor of size (tokens, vocabulary)
outlives its chunk, and no matmul runs twice. With a trained head, each chunk is checkpointed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""Target of a token that is not trained."""

CHUNK_TOKENS = 256

LogitsOf = Callable[[Tensor], Tensor]
ExtraLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]
"""(logits, targets, rows of `extra_inputs`) -> a loss summed over the tokens, or None."""
Rows = tuple[Tensor, Tensor, Tensor | None]
"""(n, hidden), (n,) and (n, any): the trained tokens, their targets and their extra inputs."""
LossOf = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The summed loss of `Rows`."""


def reference(
    hidden: Tensor,
    targets: Tensor,
    logits_of: LogitsOf,
    extra: ExtraLoss | None = None,
    extra_inputs: Tensor | None = None,
) -> Tensor:
    """The definition: all logits at once, summed cross-entropy in fp32 over targets >= 0.

    Args:
        hidden: (..., hidden); targets: (...), already shifted, `IGNORE_INDEX` where not trained.
        logits_of: (tokens, hidden) -> (tokens, vocabulary), with the model's scale and soft-cap.
        extra: another loss on the logits.
        extra_inputs: (..., any), passed to `extra` with the logits of the same tokens.
    """
    return _loss_of(logits_of, extra)(*_trained_rows(hidden, targets, extra_inputs))


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    logits_of: LogitsOf,
    extra: ExtraLoss | None = None,
    *,
    extra_inputs: Tensor | None = None,
    head_is_trained: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """`reference` in chunks of `chunk_tokens`; at most one chunk of logits exists at a time."""
    rows = _trained_rows(hidden, targets, extra_inputs)
    loss_of = _loss_of(logits_of, extra)
    if torch.is_grad_enabled() and not head_is_trained:
        return _FrozenHeadLoss.apply(*rows, loss_of, chunk_tokens)
    if not len(rows[1]):
        return _zero(hidden, logits_of)
    losses = []
    for chunk in _chunks(rows, chunk_tokens):
        if torch.is_grad_enabled():
            losses.append(checkpoint(loss_of, *chunk, use_reentrant=False))
        else:
            losses.append(loss_of(*chunk))
    return torch.stack(losses).sum()


class _FrozenHeadLoss(torch.autograd.Function):
    """Saves the gradient of `hidden` for backward, and no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        extra_inputs: Tensor | None,
        loss_of: LossOf,
        chunk_tokens: int,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        start = 0
        for chunk, t, extra_rows in _chunks((hidden, targets, extra_inputs), chunk_tokens):
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


def _zero(hidden: Tensor, logits_of: LogitsOf) -> Tensor:
    """The loss of a batch without trained tokens. The head has a gradient of zeros: ZeRO sums the
    gradients of all processes, and each must have the same ones, in the same order."""
    first = hidden.reshape(-1, hidden.shape[-1])[:1]
    return logits_of(first).float().logsumexp(-1).sum() * 0.0


def _trained_rows(hidden: Tensor, targets: Tensor, extra_inputs: Tensor | None) -> Rows:
    keep = targets != IGNORE_INDEX
    return hidden[keep], targets[keep], None if extra_inputs is None else extra_inputs[keep]


def _chunks(rows: Rows, chunk_tokens: int) -> Iterator[Rows]:
    hidden, targets, extra_inputs = rows
    for start in range(0, len(targets), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        yield hidden[part], targets[part], None if extra_inputs is None else extra_inputs[part]


def _loss_of(logits_of: LogitsOf, extra: ExtraLoss | None) -> LossOf:
    def loss_of(hidden: Tensor, targets: Tensor, extra_inputs: Tensor | None) -> Tensor:
        logits = logits_of(hidden)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        more = extra(logits, targets, extra_inputs) if extra else None
        return loss if more is None else loss + more

    return loss_of
