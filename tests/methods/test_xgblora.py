"""XGBLoRA: boosters of rank 1 on drawn layers, frozen after their steps."""

import pytest
import torch

from qlora_lite.methods.xgblora import XGBLoRA, XGBLoRAMethod
from tests.tiny import save_tiny
from tests.workbench import Bench

KAPPA = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama", num_hidden_layers=6)


def bench_of(directory, total=15, **settings):
    return Bench(directory, XGBLoRA(boost_every=KAPPA, **settings), total=total)


def test_only_the_drawn_layers_train_until_the_booster_is_finished(directory):
    bench = bench_of(directory, num_layers=2)
    draws = []
    for _ in range(15):
        before = {n: p.detach().clone() for n, p in bench.attached.parameters().items()}
        bench.step()
        after = bench.attached.parameters()
        moved = {n.split(".layers.")[1][0] for n in after if not torch.equal(after[n], before[n])}
        draws.append({int(block) for block in moved})
    assert all(draws[i] == draws[i - i % KAPPA] for i in range(15))
    assert {len(draw) for draw in draws} == {2}
    assert len({tuple(sorted(draw)) for draw in draws}) > 1


def test_a_third_of_the_layers_is_drawn_by_default_with_equal_probability():
    method = XGBLoRAMethod(XGBLoRA())
    method.layers = {str(i): None for i in range(12)}
    method._block_of = {str(i): i for i in range(12)}
    counts = torch.zeros(12)
    for seed in range(600):
        drawn = method._draw(torch.Generator().manual_seed(seed))
        assert len(set(drawn)) == 4
        counts[drawn] += 1
    # expected 200 each with standard deviation 11.5: within four of these
    assert (counts - 200).abs().max() < 46


def test_the_exported_rank_is_the_number_of_boosters_of_the_layer(directory):
    bench = bench_of(directory, num_layers=2)
    num_boosters = dict.fromkeys(bench.attached.layers, 0)
    for step in range(15):
        bench.step()
        if (step + 1) % KAPPA == 0:
            for path in bench.attached.layers:
                num_boosters[path] += bench.method._block_of[path] in bench.method._blocks
    for path, layer in bench.attached.layers.items():
        assert len(layer.bank_scales) == num_boosters[path]
        assert layer.factors().rank == num_boosters[path]
    assert sum(num_boosters.values()) == 5 * 2 * 7


def test_the_optimizer_state_does_not_grow(directory):
    bench = bench_of(directory, num_layers=2)
    sizes = []
    for _ in range(15):
        bench.step()
        state = bench.optimizer.state_dict()
        sizes.append(sum(t.numel() for k, t in state.items() if k.endswith("exp_avg")))
    at_the_end_of_boosters = sizes[KAPPA - 1 :: KAPPA]
    assert at_the_end_of_boosters == [0] * 5
    assert max(sizes) <= 2 * 7 * (64 + 128) * 2


def test_a_finished_booster_is_shrunk(directory):
    full, half = bench_of(directory), bench_of(directory, shrinkage=0.5)
    for bench in (full, half):
        for _ in range(KAPPA):
            bench.step()
    for path, layer in full.attached.layers.items():
        other = half.attached.layers[path]
        torch.testing.assert_close(other.delta(), 0.5 * layer.delta())


def test_a_bank_above_the_cap_is_recompressed(directory):
    bench = bench_of(directory, num_layers=6, max_bank_rank=2)
    for _ in range(15):
        bench.step()
    layers = bench.attached.layers.values()
    assert {len(layer.bank_scales) for layer in layers} == {2}
    assert all(layer.bank_error > 0 for layer in layers)


def test_a_run_resumed_within_a_booster_keeps_its_layers(directory):
    first = bench_of(directory, num_layers=2)
    for _ in range(4):
        first.step()
    second = XGBLoRAMethod(XGBLoRA(boost_every=KAPPA, num_layers=2))
    second.load_state_dict(first.method.state_dict())
    assert second._blocks == first.method._blocks


def test_the_penalty_is_on_the_live_booster_only(directory):
    bench = bench_of(directory, num_layers=2, norm_penalty=0.5)
    bench.step()
    live = [p for p in bench.attached.parameters().values() if p.requires_grad]
    assert len(live) == 2 * 7 * 2
    expected = 0.5 * sum(p.detach().square().sum() for p in live)
    torch.testing.assert_close(bench.method.penalty().detach(), expected)


def test_the_learning_rate_warms_up_with_every_booster_if_rewarm_is_set():
    method = XGBLoRAMethod(XGBLoRA(boost_every=4, rewarm=2))
    found = [method.lr_scale(step, 12) for step in range(8)]
    assert found == pytest.approx([1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1])


def test_an_extended_run_has_the_boosters_of_an_uninterrupted_one(directory):
    uninterrupted, extended = bench_of(directory, total=16), bench_of(directory, total=8)
    for number in range(16):
        uninterrupted.step()
        if number == 8:
            extended.total = 16
        extended.step()
    for path, layer in uninterrupted.attached.layers.items():
        assert len(extended.attached.layers[path].bank_scales) == len(layer.bank_scales)


def test_a_new_booster_starts_with_a_new_a_and_b_zero(directory):
    bench = bench_of(directory, num_layers=6)
    before = {path: layer.a.detach().clone() for path, layer in bench.attached.layers.items()}
    for _ in range(KAPPA):
        bench.step()
    for path, layer in bench.attached.layers.items():
        assert not layer.b.any()
        assert (layer.a - before[path]).abs().mean() > 0.3 * before[path].abs().mean()
