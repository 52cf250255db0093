"""Score a model on rows: mean loss, perplexity and top-1 accuracy."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lite.data.collate import Batch
from qlora_lite.kernels.cross_entropy import CHUNK_TOKENS, IGNORE_INDEX
from qlora_lite.model.causal import CausalModel


@dataclass(frozen=True)
class Score:
    """A model's score on some rows."""

    loss: float
    """Mean negative log-likelihood of the target tokens, in nats."""
    accuracy: float
    """Share of target tokens that are the top-1 prediction."""
    num_targets: int
    guesses: Tensor
    """Top-1 prediction for every target token, in order: (num_targets,)."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def agreement(self, other: "Score") -> float:
        """Top-1 agreement: share of tokens for which both models predict the same."""
        return (self.guesses == other.guesses).float().mean().item()


@torch.no_grad()
def score(
    model: CausalModel,
    batches: Iterable[Batch],
    sum_over_processes: Callable[[Tensor], Tensor] = lambda value: value,
) -> Score:
    """Score `model` on batches. Logits are computed for one chunk of target tokens at a time.

    Args:
        sum_over_processes: sums (losses, hits, targets) if every process has some of the batches;
            `guesses` are then those of this process.
    """
    loss_sum = 0.0
    hits = 0
    guesses: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    for batch in (batch.to(model.device) for batch in batches):
        keep = batch.targets != IGNORE_INDEX
        hidden = model.hidden(batch.input_ids, batch.position_ids)[keep].split(CHUNK_TOKENS)
        chunks = zip(hidden, batch.targets[keep].split(CHUNK_TOKENS), strict=True)
        with model.head.gathered():
            for h, t in chunks:
                logits = model.logits(h).float()
                loss_sum += F.cross_entropy(logits, t, reduction="sum").item()
                guess = logits.argmax(-1)
                hits += int((guess == t).sum())
                guesses.append(guess.cpu())
    found = torch.cat(guesses)
    sums = sum_over_processes(torch.tensor([loss_sum, hits, len(found)], dtype=torch.float64))
    loss_sum, num_hits, count = sums.tolist()
    return Score(loss_sum / count, num_hits / count, int(count), found)
