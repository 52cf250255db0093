"""Comparing the logits of two models."""

import math

import pytest
import torch

from qlora_lite.export import verify
from qlora_lite.export.merge import MergedWeights
from qlora_lite.export.trained_layers import TrainedLayers
from qlora_lite.export.verify import (
    SAFETY,
    Agreement,
    candidate,
    compare,
    original_bounds,
    read_back,
    rounding_bounds,
    sample_logits,
)
from qlora_lite.model.quant import NF4
from tests.export.test_merge import EVERYTHING, write_directory
from tests.export.trained import batches, train_a_little


def test_the_error_is_relative_to_the_largest_logit_and_top1_is_a_share():
    reference = torch.tensor([[1.0, -4.0], [2.0, 3.0]])
    other = torch.tensor([[1.0, -3.0], [3.0, 2.5]])
    found = compare(reference, other, torch.tensor([0, 1]))
    assert (found.relative_error, found.top1, found.num_tokens) == (1 / 4, 1 / 2, 2)
    # centred: differences of 0.5 (four times, with signs), logits of 2.5 and 0.5
    assert found.rms_error == pytest.approx(((0.25 + 0.5625) / (6.25 + 0.25)) ** 0.5)
    assert found.loss_change > 0
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_keeps_its_bounds_and_a_larger_error_does_not(dtype):
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(64, 64, generator=generator) / 8 for _ in range(9)]
    x = torch.randn(200, 64, generator=generator)

    def logits(change):
        y = x
        for layer in layers:
            y = torch.nn.functional.silu(y @ change(layer)) + y
        return y

    reference = logits(lambda layer: layer)
    bounds = rounding_bounds(reference, dtype, torch.float32, len(layers))
    rounded = compare(reference, logits(lambda layer: layer.to(dtype).float()))
    assert bounds.rms_error / 30 < rounded.rms_error < bounds.rms_error / 4
    assert bounds.problem(rounded) is None
    damaged = logits(lambda layer: layer + bounds.rms_error * layer.std() * torch.randn(64, 64))
    assert "logits differ by" in bounds.problem(compare(reference, damaged))
    assert bounds.problem(compare(reference, reference * torch.nan))


def test_the_original_base_may_differ_as_much_as_it_does_without_the_adapter():
    generator = torch.Generator().manual_seed(0)
    reference, noise = (torch.randn(50, 40, generator=generator) for _ in range(2))
    rounding = rounding_bounds(reference, torch.bfloat16, torch.float32, 8)
    bounds = original_bounds(reference, reference, reference + 0.05 * noise, rounding)
    quantisation = 0.05 * (noise.std() / reference.std()).item()
    expected = math.hypot(SAFETY * quantisation, rounding.rms_error)
    assert bounds.rms_error == pytest.approx(expected, rel=0.05)
    targets = reference.argmax(-1)
    near = compare(reference, reference + 0.1 * noise, targets)
    far = compare(reference, reference + 0.5 * noise, targets)
    assert bounds.problem(near) is None
    assert "logits differ by" in (bounds.problem(far) or "")
    same = original_bounds(reference, reference, reference, rounding)
    assert same.rms_error == pytest.approx(rounding.rms_error)
    assert bounds.problem(Agreement(0.1, 0.9, 9, 0.1, float("nan")))


def test_the_merge_on_the_original_base_may_not_score_half_a_nat_worse():
    reference = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    rounding = rounding_bounds(reference, torch.bfloat16, torch.float32, 8)
    bounds = original_bounds(reference, reference, -reference, rounding)
    worse, slightly_worse = (Agreement(0.3, 0.9, 9, 0.3, loss) for loss in (0.6, 0.4))
    assert "0.600 nats higher" in (bounds.problem(worse) or "")
    assert bounds.problem(slightly_worse) is None
