"""Scores against logits and cross-entropy of the whole model."""

import math

import pytest
import torch
from torch.nn import functional as F

from qlora_lite.data.collate import Batch
from qlora_lite.evaluation import perplexity
from qlora_lite.kernels.cross_entropy import IGNORE_INDEX
from qlora_lite.model.causal import CausalModel
from tests.tiny import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def batch_of(seed, tokens=24, rows=2):
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, tokens + 1), generator=draws)
    targets = ids[:, 1:].clone()
    targets[:, ::3] = IGNORE_INDEX
    positions = torch.arange(tokens).expand(rows, -1)
    count = int((targets != IGNORE_INDEX).sum())
    return Batch(ids[:, :-1], targets, positions, count, rows * tokens, list(range(rows)))


def test_the_score_is_that_of_the_full_logits(model, monkeypatch):
    monkeypatch.setattr(perplexity, "CHUNK_TOKENS", 5)  # chunks that do not divide the targets
    batches = [batch_of(0), batch_of(1, tokens=11)]
    found = perplexity.score(CausalModel(model), batches)
    targets = torch.cat([b.targets.flatten() for b in batches])
    with torch.no_grad():
        logits = torch.cat([model(b.input_ids).logits.flatten(0, 1) for b in batches])
    kept = targets != IGNORE_INDEX
    loss = F.cross_entropy(logits[kept], targets[kept]).item()
    guesses = logits[kept].argmax(-1)
    assert found.num_targets == int(kept.sum()) == sum(b.num_targets for b in batches)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.accuracy == pytest.approx((guesses == targets[kept]).float().mean().item())
    assert torch.equal(found.guesses, guesses)


def test_agreement_is_the_share_of_equal_predictions(model):
    first = perplexity.score(CausalModel(model), [batch_of(0)])
    changed = first.guesses.clone()
    changed[:4] += 1
    second = perplexity.Score(first.loss, first.accuracy, first.num_targets, changed)
    assert first.agreement(first) == 1
    assert first.agreement(second) == pytest.approx(1 - 4 / first.num_targets)


def test_the_perplexity_of_a_huge_loss_does_not_overflow():
    assert math.isfinite(perplexity.Score(1e6, 0.0, 1, torch.zeros(1)).perplexity)
