"""Comparing the logits of two models."""

import pytest
import torch

from qlora_lite.export import verify
from qlora_lite.export.merge import MergedWeights
from qlora_lite.export.trained_layers import TrainedLayers
from qlora_lite.export.verify import Agreement, candidate, compare, read_back, sample_logits
from qlora_lite.model.quant import NF4
from tests.export.test_merge import EVERYTHING, write_directory
from tests.export.trained import batches, train_a_little


def test_the_error_is_relative_to_the_largest_logit_and_top1_is_a_share():
    reference = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    other = torch.tensor([[1.0, -3.0], [3.0, 2.5]])
    assert compare(reference, other) == Agreement(1 / 4, 1 / 2, 2)
    assert compare(reference, reference) == Agreement(0.0, 1.0, 2)
    assert compare(reference, reference * (1 + 1e-5)).is_exact
    assert not compare(reference, reference * (1 + 1e-3)).is_exact


def test_logits_are_those_of_the_first_trained_tokens(tmp_path, monkeypatch):
    model = train_a_little(tmp_path / "base").causal
    (batch,) = batches()
    logits = model.module(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).logits
    expected = logits[batch.targets != -100]
    torch.testing.assert_close(sample_logits(model, [batch]), expected, rtol=1e-5, atol=1e-5)
    num = len(expected)
    monkeypatch.setattr(verify, "SAMPLED_TOKENS", num + 5)
    sampled = sample_logits(model, [batch, batch, batch])
    torch.testing.assert_close(sampled, torch.cat([expected, expected[:5]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["trained", "original"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_candidate_in_memory_is_the_model_that_is_written(tmp_path, family, base, dtype):
    adapter = EVERYTHING.model_copy(update={"ranks": {"1": 0}})
    trained = train_a_little(tmp_path / "base", NF4(), adapter, family=family, tied=True)
    out = write_directory(trained, tmp_path / "out", base, dtype)
    source = trained.source
    weights = MergedWeights(TrainedLayers(source, base), dtype)
    in_memory = sample_logits(candidate(weights, source.base, source.rule), batches())
    from_files = sample_logits(read_back(out, source.base, source.rule), batches())
    assert torch.equal(in_memory, from_files)
