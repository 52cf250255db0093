"""Backward, step and access to parameters."""

import pytest
import torch
from torch import nn

from qlora_lite.adapters.method import ParameterGroup, StepInfo
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.optimizer import AdamW


def engine_for(*parameters, rounding="master"):
    names = tuple(f"p{i}" for i in range(len(parameters)))
    optimizer = AdamW(
        [ParameterGroup(names, parameters)],
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        states="32bit",
        rounding=rounding,
    )
    return TorchEngine(optimizer, torch.float32)


def info(lr=0.1):
    return StepInfo(0, 10, lr, torch.Generator().manual_seed(0))


def test_gradients_are_summed_in_fp32_over_micro_batches():
    # in bf16 a sum of 512 stops growing by 1 at 256
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    engine = engine_for(p)
    for i in range(512):
        engine.backward(p.float().sum(), last=i == 511)
    assert engine.gradient(p).item() == 512


def test_the_returned_norm_is_before_clipping_and_the_step_uses_the_clipped_gradient():
    p, q = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    engine = engine_for(p, q)
    engine.backward(3 * p.sum() + 4 * q.sum(), last=True)
    norm = engine.step(1.0, info())
    assert norm == pytest.approx((9 + 9 + 16) ** 0.5)
    torch.testing.assert_close(engine.gradient(q), torch.tensor([4 / norm]))


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_a_method_reads_writes_and_edits_gradients(rounding):
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    engine = engine_for(p, rounding=rounding)
    engine.write(p, torch.tensor([1.0, 2.0, 3.0]))
    assert engine.read(p).tolist() == [1, 2, 3]
    assert p.tolist() == [1, 2, 3]
    engine.backward(p.float().sum(), last=True)
    engine.set_gradient(p, torch.tensor([0.0, 0.0, 1.0]))
    engine.step(1e9, info())
    engine.zero_grad()
    assert p[:2].tolist() == [1, 2]
    assert p[2].item() < 3
    assert engine.gradient(p) is None


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
@pytest.mark.parametrize("is_early", [True, False])
def test_a_written_value_survives_the_next_step(rounding, is_early):
    # a write that missed the fp32 copy would be undone when the copy is rounded to bf16
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    engine = engine_for(p, rounding=rounding)
    if is_early:
        engine.write(p, torch.tensor([5.0]))
    engine.backward(p.float().sum(), last=True)
    if not is_early:
        engine.write(p, torch.tensor([5.0]))
    engine.step(1.0, info(lr=0.01))
    assert p.item() == pytest.approx(4.99, abs=0.03)


def test_the_loss_scale_is_saved_and_restored():
    engine, resumed = (engine_for(nn.Parameter(torch.zeros(1))) for _ in range(2))
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    resumed.scaler = torch.amp.GradScaler("cpu")
    resumed.load_state_dict(engine.state_dict())
    assert resumed.scaler.get_scale() == 64
    assert resumed.scaler.state_dict() == engine.scaler.state_dict()
