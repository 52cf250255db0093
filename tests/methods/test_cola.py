"""COLA: when a link is finished, and how the next one starts."""

import pytest
import torch
from pydantic import ValidationError

from qlora_lite.adapters.warm_start import warm_start
from qlora_lite.methods.cola import COLA, COLAMethod
from qlora_lite.model.quant import FP32
from qlora_lite.model.targets import LinearSpec
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics
from tests.end_to_end.small_run import small_recipe, write_rows
from tests.tiny import save_tiny
from tests.workbench import Bench

TOTAL = 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def layers_of(bench):
    return list(bench.attached.layers.values())


def test_links_share_the_run_and_each_restarts_the_schedule():
    method = COLAMethod(COLA(num_links=3))
    clocks = [method.schedule_position(step, 11) for step in range(11)]
    lengths = [3, 4, 4]
    assert clocks == [(i, n) for n in lengths for i in range(n)]
    assert COLAMethod(COLA(num_links=1)).schedule_position(7, 11) == (7, 11)


def test_a_link_is_tied_at_the_end_of_its_share_and_the_next_starts_at_zero(directory):
    bench = Bench(directory, COLA(rank=4, alpha=6, num_links=3), total=TOTAL)
    ranks = []
    for done in range(1, TOTAL + 1):
        before = {p: layer.a.detach().clone() for p, layer in bench.attached.layers.items()}
        bench.step()
        ranks.append(len(layers_of(bench)[0].bank_scales))
        if done in (4, 8):
            assert not any(layer.b.any() for layer in layers_of(bench))
            state = bench.optimizer.state_dict()
            assert not [key for key in state if not key.endswith(":master")]
            for path, layer in bench.attached.layers.items():
                assert not torch.equal(layer.a.detach(), before[path])
    assert ranks == [0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 8]
    assert all(layer.factors().rank == 12 for layer in layers_of(bench))
    assert all(layer.b.any() for layer in layers_of(bench))


def test_a_tie_does_not_change_the_outputs(directory):
    class Late(COLAMethod):
        """Ties only when the test calls `tie`, to compare before and after."""

        def after_step(self, access, step):
            self.tie = lambda: COLAMethod.after_step(self, access, step)

    bench = Bench(directory, COLA(rank=4, num_links=2), FP32(), total=4, method=Late)
    bench.step()
    bench.step()
    before = bench.logits()
    bench.method.tie()
    assert len(layers_of(bench)[0].bank_scales) == 4
    torch.testing.assert_close(bench.logits(), before, rtol=1e-5, atol=1e-5)


def test_finished_links_are_frozen(directory):
    bench = Bench(directory, COLA(rank=4, num_links=2), total=8)
    for _ in range(4):
        bench.step()
    finished = {p: layer.bank_up.clone() for p, layer in bench.attached.layers.items()}
    for _ in range(4):
        bench.step()
    for path, layer in bench.attached.layers.items():
        assert torch.equal(layer.bank_up, finished[path])


def test_unused_components_of_links_of_falling_rank_stay_zero(directory):
    settings = COLA(rank=4, alpha=6, num_links=3, link_ranks=[4, 2, 1])
    bench = Bench(directory, settings, total=TOTAL)
    for done in range(1, TOTAL + 1):
        bench.step()
        rank = 4 if done < 4 else 2 if done < 8 else 1
        for layer in layers_of(bench):
            assert not layer.a[rank:].any()
            assert not layer.b[:, rank:].any()
            assert layer.scale == 6 / rank
    assert {len(layer.bank_scales) for layer in layers_of(bench)} == {6}


def test_every_layer_has_the_rank_of_its_first_link(directory):
    settings = COLA(rank=8, num_links=2, link_ranks=[4, 2], ranks={"0": 3})
    for path, layer in Bench(directory, settings).attached.layers.items():
        rank = 3 if ".0." in path else 4
        assert (layer.a.shape[0], layer.b.shape[1]) == (rank, rank)


def test_a_loaded_layer_has_the_scale_of_its_link(directory):
    settings = COLA(rank=4, alpha=6, num_links=3, link_ranks=[4, 2, 1])
    bench = Bench(directory, settings, total=TOTAL)
    for _ in range(TOTAL):
        bench.step()
    saved = {name: tensor.clone() for name, tensor in bench.attached.state().items()}
    assert torch.equal(Bench(directory, settings, saved=saved).logits(), bench.logits())


def test_the_memory_plan_counts_the_final_bank(directory):
    settings = COLA(rank=4, num_links=3, link_ranks=[4, 2, 1])
    bench = Bench(directory, settings, total=TOTAL)
    for _ in range(TOTAL):
        bench.step()
    for path, layer in bench.attached.layers.items():
        spec = LinearSpec(path, layer.base.d_in, layer.base.d_out, 0, 2, "other")
        found = layer.bank_down.numel() + layer.bank_up.numel()
        assert bench.method.footprint(spec, bench.plan.layers[path]).frozen == found


@pytest.mark.parametrize("ranks", [[8, 4], [4, 8, 2], [16, 8, 4], [8, 0, 0]])
def test_invalid_link_ranks_are_an_error(ranks):
    with pytest.raises(ValidationError, match="link_ranks="):
        COLA(rank=8, num_links=3, link_ranks=ranks)


def test_the_learning_rate_restarts_with_every_link(directory, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    changes = ("adapter=cola", "adapter.num_links=3", "optim.schedule=linear", "optim.warmup=0")
    run_recipe(small_recipe(directory, rows, tmp_path / "run", *changes))
    steps = [
        event["lr"] for event in metrics.read(tmp_path / "run" / "metrics.jsonl") if "lr" in event
    ]
    assert steps == pytest.approx([5e-3 * (1 - i / 4) for _ in range(3) for i in range(4)])


def test_an_extended_run_ties_at_the_ends_of_its_new_shares(directory):
    settings = COLA(rank=4, num_links=3)
    first = Bench(directory, settings, total=6)
    for _ in range(6):
        first.step()
    assert len(layers_of(first)[0].bank_scales) == 8
    first.total = 24  # links start at 0, 8 and 16
    ranks = []
    for _ in range(18):
        first.step()
        ranks.append(len(layers_of(first)[0].bank_scales))
    assert ranks == [8] + [12] * 8 + [16] * 9


def test_a_warm_start_from_a_chain_starts_a_new_chain(directory, tmp_path):
    settings = COLA(rank=4, alpha=6, num_links=3, link_ranks=[4, 2, 1])
    first = Bench(directory, settings, total=6)
    for _ in range(6):
        first.step()
    first.save(tmp_path / "adapter")
    second = Bench(directory, settings, total=6, seed=5)
    warm_start(second.attached, tmp_path / "adapter")
    torch.testing.assert_close(second.logits(), first.logits(), rtol=1e-5, atol=1e-5)
    assert all(len(layer.bank_scales) == 7 for layer in layers_of(second))
    assert all(layer.scale == 6 / 4 and layer.a.any(dim=1).all() for layer in layers_of(second))
    for _ in range(6):
        second.step()
    assert all(len(layer.bank_scales) == 7 + 6 for layer in layers_of(second))
