"""How well a model predicts rows: mean loss, perplexity, and how often its first guess is right."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lite.data.batches import Batch
from qlora_lite.kernels.cross_entropy import CHUNK_TOKENS, IGNORE_INDEX
from qlora_lite.model.causal import CausalModel


@dataclass(frozen=True)
class Score:
    """A model's score on some rows."""

    loss: float
    """Mean negative log-likelihood of a trained token, in nats."""
    accuracy: float
    """Share of trained tokens that are the model's first guess."""
    num_targets: int
    guesses: Tensor
    """The model's first guess at every trained token, in order: (num_targets,)."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def agreement(self, other: "Score") -> float:
        """Share of tokens at which two models guess the same."""
        return (self.guesses == other.guesses).float().mean().item()


@torch.no_grad()
def score(model: CausalModel, batches: Iterable[Batch]) -> Score:
    """Score `model` on batches; logits exist a chunk of trained tokens at a time."""
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
