"""SoRA: the proximal step on the gates, and its thresholds."""

import pytest
import torch
from pydantic import ValidationError

from qlora_lite.adapters.method import StepInfo
from qlora_lite.methods.sora import SoRA, released_threshold, soft_threshold, threshold_at
from tests.tiny import save_tiny
from tests.workbench import Bench, one_layer


def info(step=0, total=8, lr=1e-3):
    return StepInfo(step, total, lr, torch.Generator())


def test_the_soft_threshold_is_the_proximal_step_of_the_l1_norm():
    gates = torch.tensor([-2.5, -1.0, -0.3, 0.0, 0.3, 1.0, 1.5, 2.5])
    expected = torch.tensor([-1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 1.5])
    assert torch.equal(soft_threshold(gates, 1.0), expected)
    assert torch.equal(soft_threshold(gates, 0.0), gates)
    assert torch.equal(soft_threshold(-gates, 1.0), -expected)
    grid = torch.linspace(-4, 4, 4001)
    for g in (0.7, -1.4, 3.0):  # it minimises (z - g)^2 / 2 + |z|
        best = grid[((grid - g) ** 2 / 2 + grid.abs()).argmin()]
        assert soft_threshold(torch.tensor(g), 1.0) == pytest.approx(best.item(), abs=2e-3)


def test_the_released_step_is_a_hard_threshold_at_twice_the_width():
    gates = torch.tensor([0.5, 1.5, 2.0, 2.5, -1.5, -2.5])
    expected = torch.tensor([0.0, 0.0, 0.0, 1.5, 0.0, -1.5])
    assert torch.equal(released_threshold(gates, 1.0), expected)


def test_after_every_step_a_gate_is_exactly_zero_or_was_above_the_threshold(tmp_path):
    width = 0.05
    bench = Bench(save_tiny(tmp_path / "base"), SoRA(rank=8, alpha=16, threshold=width))
    seen = []
    for _ in range(12):
        bench.step()
        gates = torch.cat([layer.g.detach() for layer in bench.attached.layers.values()])
        seen.append(int((gates == 0).sum()))
    assert seen[0] > 0
    assert seen[-1] > seen[0]
    assert seen[-1] < len(gates)
    for layer in bench.attached.layers.values():
        kept = int((layer.g != 0).sum())
        assert layer.factors().rank == kept
        assert torch.linalg.matrix_rank(layer.delta()) <= kept


@pytest.mark.parametrize("release", [False, True])
def test_a_step_shrinks_every_gate_by_the_threshold(tmp_path, release):
    settings = SoRA(rank=8, threshold=0.1, release_prox=release)
    bare = SoRA(rank=8, threshold=0.0)
    directory = save_tiny(tmp_path / "base")
    shrunk, plain = Bench(directory, settings), Bench(directory, bare)
    shrunk.step()
    plain.step()
    for path, layer in plain.attached.layers.items():
        expected = torch.tensor(
            [
                0.0 if abs(g) <= 0.1 * (1 + release) else g - 0.1 * (1 if g > 0 else -1)
                for g in layer.g.tolist()
            ]
        )
        torch.testing.assert_close(shrunk.attached.layers[path].g.detach(), expected)


@pytest.mark.parametrize("threshold", [[], -0.1, [0.1, -0.2], [0.2, 0.1]])
def test_negative_or_decreasing_thresholds_are_an_error(threshold):
    with pytest.raises(ValidationError, match=r"threshold=.*0 or more.*must not decrease"):
        SoRA(threshold=threshold)


def test_a_huge_threshold_gives_the_outputs_of_the_base(tmp_path):
    bench = Bench(save_tiny(tmp_path / "base"), SoRA(rank=4, threshold=100.0))
    start = bench.logits()
    bench.step()
    assert torch.equal(bench.logits(), start)
    assert all(layer.factors().rank == 0 for layer in bench.attached.layers.values())


def test_a_skipped_step_shrinks_nothing():
    layer = one_layer(SoRA(rank=4, threshold=0.5), 33, 57)
    before = layer.g.detach().clone()
    layer.method.after_step(None, StepInfo(0, 8, 1e-3, torch.Generator(), skipped=True))
    assert torch.equal(layer.g.detach(), before)


def test_the_threshold_is_constant_scheduled_or_proportional_to_the_learning_rate():
    assert threshold_at(SoRA(threshold=0.25), info(5)) == 0.25
    schedule = SoRA(threshold=[0.1, 0.2, 0.4, 0.8])
    widths = [threshold_at(schedule, info(step)) for step in range(8)]
    assert widths == [0.1, 0.1, 0.2, 0.2, 0.4, 0.4, 0.8, 0.8]
    assert threshold_at(SoRA(threshold_per_lr=3.0), info(lr=0.5)) == 1.5
    assert threshold_at(SoRA(threshold_per_lr=3.0, lr_ratio=4.0), info(lr=0.5)) == 6.0


def test_the_penalty_is_the_mean_absolute_gate():
    layer = one_layer(SoRA(rank=4, l1=0.5, threshold=0.0), 33, 57)
    assert layer.method.penalty().item() == pytest.approx(0.5 * layer.g.abs().mean().item())
