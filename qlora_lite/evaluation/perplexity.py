"""Score a model on rows: mean loss, perplexity and top-1 accuracy."""

import math
from collections.abc import Iterable
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
def score(model: CausalModel, batches: Iterable[Batch]) -> Score:
    """Score `model` on batches. Logits are computed for one chunk of target tokens at a time."""
    loss_sum = 0.0
    hits = 0
    guesses: list[Tensor] = []
    for batch in (batch.to(model.device) for batch in batches):
        keep = batch.targets != IGNORE_INDEX
        hidden = model.hidden(batch.input_ids, batch.position_ids)[keep].split(CHUNK_TOKENS)
        for h, t in zip(hidden, batch.targets[keep].split(CHUNK_TOKENS), strict=True):
            logits = model.logits(h).float()
            loss_sum += F.cross_entropy(logits, t, reduction="sum").item()
            guess = logits.argmax(-1)
            hits += int((guess == t).sum())
            guesses.append(guess.cpu())
    all_guesses = torch.cat(guesses)
    count = len(all_guesses)
    return Score(loss_sum / count, hits / count, count, all_guesses)
