"""PRILoRA: linear ranks, average input sizes, and the pruning of A."""

import pytest
import torch
from pydantic import ValidationError

from qlora_lite.adapters.method import StepInfo
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.seeds import generator
from qlora_lite.methods.lora import LoRA, LoRAMethod
from qlora_lite.methods.prilora import (
    PRILoRA,
    PRILoRAMethod,
    is_pruning_due,
    least_important,
    pruning_is_over,
    rank_on_line,
)
from qlora_lite.model.targets import LinearSpec
from qlora_lite.training.step import summed_loss
from tests.methods.access import PlainAccess
from tests.tiny import save_tiny
from tests.workbench import Bench, batches_of, one_layer, perturb

CLOSE = {"rtol": 1e-5, "atol": 1e-7}
"""fp32 sums of a few hundred squares, in another order."""

PRUNING = {"rank": 4, "alpha": 8, "prune_every": 3, "prune_until": 0.5}
"""Prunes after steps 3, 6 and 9 of 20."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def bench(directory, settings, method=PRILoRAMethod, **how):
    return Bench(directory, settings, method=method, **how)


def made(settings=None, d_out=33, d_in=57, **how):
    settings = settings or PRILoRA(rank=4)
    return one_layer(settings, d_out, d_in, method=PRILoRAMethod, **how)


def spec(block, num_blocks=12, name="q_proj"):
    path = "lm_head" if block is None else f"layers.{block}.{name}"
    return LinearSpec(path, 64, 48, block, num_blocks, "attention")


def planned(settings, specs):
    return PRILoRAMethod(settings).plan(specs)


def zeros(run):
    """(zeros, width) of the rows of every A; equal in the fp32 copy and in the parameter."""
    found = set()
    for layer in run.attached.layers.values():
        kept = run.engine.read(layer.a)
        assert torch.equal(kept == 0, layer.a == 0)
        found |= {(int(n), layer.a.shape[1]) for n in (kept == 0).sum(1)}
    return found


# -- ranks -----------------------------------------------------------------------------------------


def test_the_default_ranks_of_twelve_blocks_are_those_of_the_paper():
    plans = planned(PRILoRA(), [spec(i) for i in range(12)])
    ranks = [plan.rank for plan in plans.values()]
    assert ranks == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    assert sum(ranks) == 12 * 8


@pytest.mark.parametrize(
    ("first", "last", "blocks"), [(4, 12, 32), (1, 3, 7), (2, 2, 5), (1, 9, 2)]
)
def test_ranks_rise_from_the_first_to_the_last(first, last, blocks):
    ranks = [rank_on_line(first, last, block, blocks) for block in range(blocks)]
    assert (ranks[0], ranks[-1]) == (first, last)
    assert ranks == sorted(ranks)
    assert abs(sum(ranks) - blocks * (first + last) / 2) <= blocks / 2
    assert rank_on_line(last, first, 0, blocks) == last


def test_halves_are_rounded_up():
    assert [rank_on_line(1, 2, block, 3) for block in range(3)] == [1, 2, 2]
    assert [rank_on_line(4, 1, block, 3) for block in range(3)] == [4, 3, 1]


def test_without_several_blocks_the_rank_is_the_middle_of_the_line():
    settings = PRILoRA(first_rank=3, last_rank=8)
    specs = [spec(0), spec(None), spec(11)]
    assert [p.rank for p in planned(settings, specs).values()] == [3, 6, 8]
    assert made(settings).a.shape == (6, 57)


def test_all_layers_of_a_block_have_its_rank_unless_a_pattern_matches():
    specs = [spec(i, 3, name) for i in range(3) for name in ("q_proj", "up_proj", "v_proj")]
    settings = PRILoRA(first_rank=2, last_rank=6, ranks={"v_proj": 0, "2": 9, "up_proj": 1})
    ranks = {path: plan.rank for path, plan in planned(settings, specs).items()}
    assert ranks == {
        "layers.0.q_proj": 2,
        "layers.0.up_proj": 1,
        "layers.1.q_proj": 4,
        "layers.1.up_proj": 1,
        "layers.2.q_proj": 9,
        "layers.2.up_proj": 1,
        "layers.2.v_proj": 9,
    }


@pytest.mark.parametrize(
    ("scaling", "scales"), [("alpha/r", [4, 2]), ("alpha/sqrt(r)", [8, 32**0.5])]
)
def test_alpha_is_the_same_in_all_layers(scaling, scales):
    settings = PRILoRA(first_rank=4, last_rank=8, alpha=16, scaling=scaling)
    plans = planned(settings, [spec(0), spec(11)])
    assert [plan.scale for plan in plans.values()] == pytest.approx(scales)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, (4, 12)),
        ({"rank": 16}, (8, 24)),
        ({"rank": 5}, (3, 7)),
        ({"rank": 1}, (1, 1)),
        ({"rank": 8, "first_rank": 6}, (6, 10)),
        ({"rank": 8, "last_rank": 9}, (7, 9)),
        ({"rank": 99, "first_rank": 2, "last_rank": 3}, (2, 3)),
    ],
)
def test_the_rank_is_the_mean_of_the_line_unless_both_ends_are_given(settings, line):
    assert PRILoRA(**settings).line == line


def test_ranks_below_1_are_an_error():
    with pytest.raises(ValidationError, match="from -4 to 20"):
        PRILoRA(rank=8, last_rank=20)


# -- which entries are pruned ----------------------------------------------------------------------


def naive_mask(a, activity, share):
    """Row by row: sort the scores, take the lowest."""
    mask = torch.zeros(a.shape, dtype=torch.bool)
    for i, row in enumerate(a.tolist()):
        scores = sorted((abs(value) * activity[j].item(), j) for j, value in enumerate(row))
        for _, j in scores[: int(share * len(row))]:
            mask[i, j] = True
    return mask


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_the_lowest_scores_of_each_row_are_pruned(share):
    draw = torch.Generator().manual_seed(0)
    a, activity = torch.randn(6, 57, generator=draw), torch.rand(57, generator=draw)
    found = least_important(a, activity, share)
    assert torch.equal(found, naive_mask(a, activity, share))
    assert set(found.sum(1).tolist()) == {int(share * 57)}


def test_large_weights_of_small_inputs_are_pruned_before_small_weights_of_large_inputs():
    a = torch.tensor([[5.0, 0.1, -4.0, 0.2]])
    activity = torch.tensor([0.01, 9.0, 0.01, 9.0])
    assert least_important(a, activity, 0.5).tolist() == [[True, False, True, False]]


def test_ties_do_not_prune_more_than_the_share():
    assert least_important(torch.ones(3, 10), torch.ones(10), 0.5).sum(1).tolist() == [5, 5, 5]


# -- when it is pruned -----------------------------------------------------------------------------


def test_pruning_ends_at_its_share_of_the_run():
    assert [d for d in range(1, 401) if is_pruning_due(d, 400, 40, 0.9)] == list(range(40, 361, 40))
    assert [d for d in range(1, 101) if is_pruning_due(d, 100, 29, 0.29)] == [29]
    assert [d for d in range(401) if pruning_is_over(d, 400, 40, 0.9)] == list(range(360, 401))
    assert [d for d in range(11) if pruning_is_over(d, 10, 3, 1.0)] == [9, 10]


def test_a_run_that_is_too_short_is_never_pruned():
    assert not any(is_pruning_due(d, 43, 40, 0.9) for d in range(1, 44))
    assert not any(pruning_is_over(d, 43, 40, 0.9) for d in range(44))


def test_rows_have_zeros_after_a_pruning_and_grow_again(directory):
    run = bench(directory, PRILoRA(**PRUNING, prune_share=0.3))
    after_pruning = {(int(0.3 * width), width) for width in (64, 128)}
    for done in range(1, 13):
        run.step()
        assert zeros(run) == (after_pruning if done in (3, 6, 9) else {(0, 64), (0, 128)}), done


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_uses_the_updated_weights_and_the_inputs_of_this_step(directory, dtype):
    seen = {}

    class Watching(PRILoRAMethod):
        def _prune(self, a, activity, access):
            value = access.read(a).float()
            super()._prune(a, activity, access)
            seen[a] = value, activity.clone(), access.read(a)

    run = bench(directory, PRILoRA(**PRUNING), Watching, dtype=dtype)
    for _ in range(3):
        before = {layer.a: run.engine.read(layer.a) for layer in run.attached.layers.values()}
        run.step()
    assert len(seen) == len(run.attached.layers)
    for path, layer in run.attached.layers.items():
        value, activity, left = seen[layer.a]
        assert not torch.equal(value, before[layer.a])
        assert torch.equal(activity, run.method.activity[path])
        assert torch.equal(left, value.masked_fill(naive_mask(value, activity, 0.5), 0))


# -- the inputs ------------------------------------------------------------------------------------


def record_inputs(run):
    """The inputs of every layer, by path and step."""
    seen = {path: {} for path in run.attached.layers}
    for path, layer in run.attached.layers.items():

        def note(module, inputs, path=path):
            seen[path].setdefault(run.number, []).append(inputs[0].detach().flatten(0, -2))

        layer.register_forward_pre_hook(note)
    return seen


def test_the_average_equals_the_formula_over_all_micro_batches(directory):
    run = bench(directory, PRILoRA(rank=4, beta=0.7))
    seen = record_inputs(run)
    for _ in range(4):
        run.step()
    for path, by_step in seen.items():
        v = torch.zeros(run.attached.layers[path].base.d_in)
        for parts in by_step.values():
            assert len(parts) == 2
            x = torch.cat(parts)
            u = torch.stack([(x[:, j] ** 2).mean().sqrt() for j in range(x.shape[1])])
            v = 0.7 * v + 0.3 * u
        assert run.method.activity[path].dtype == torch.float32
        torch.testing.assert_close(run.method.activity[path], v, **CLOSE)


def test_with_checkpointing_every_token_counts_once(directory):
    plain = bench(directory, PRILoRA(**PRUNING))
    checkpointed = bench(directory, PRILoRA(**PRUNING), checkpointing=True)
    for _ in range(4):
        assert plain.step() == checkpointed.step()
    layer = next(iter(checkpointed.attached.layers.values()))
    assert layer.num_tokens == 2 * 2 * 12  # micro-batches, rows, tokens
    for path, activity in plain.method.activity.items():
        assert torch.equal(checkpointed.method.activity[path], activity)


def test_evaluation_and_forwards_before_the_first_step_are_not_averaged(directory):
    plain, other = (bench(directory, PRILoRA(**PRUNING)) for _ in range(2))
    other.attached.train()
    loss = summed_loss(other.model, next(batches_of(99, 5)), other.attached).total
    other.engine.backward(loss, last=False)
    other.engine.zero_grad()
    for _ in range(4):
        assert plain.step() == other.step()
        other.logits()
    for path, activity in plain.method.activity.items():
        assert torch.equal(other.method.activity[path], activity)
    layer = next(iter(other.attached.layers.values()))
    assert layer.num_tokens == 2 * 2 * 12


def test_bf16_inputs_are_measured_in_fp32():
    layer = made().train()
    x = 300 * torch.randn(5000, 57).bfloat16()
    layer.update(x)
    expected = (x.double() ** 2).sum(0)
    assert layer.squares.dtype == torch.float32
    torch.testing.assert_close(layer.squares.double(), expected, rtol=1e-5, atol=0)


def test_inputs_are_measured_before_dropout():
    layer = made(PRILoRA(rank=4, dropout=0.5)).train()
    x = torch.randn(20, 57)
    layer.update(x)
    torch.testing.assert_close(layer.squares, x.square().sum(0), **CLOSE)


def info(step, **how):
    return StepInfo(step, 20, 1e-2, generator(0, "method", step), **how)


class SendingAccess(PlainAccess):
    """The access of the other process: records what it sends."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def sum_over_ranks(self, value):
        self.sent.append(value.clone())
        return value


class ReceivingAccess(PlainAccess):
    """The access of this process: adds what the other one sent, in the same order."""

    def __init__(self, sent):
        super().__init__()
        self.sent = iter(sent)

    def sum_over_ranks(self, value):
        other = next(self.sent)
        assert (other.shape, other.dtype) == (value.shape, value.dtype)
        return value + other


@pytest.mark.parametrize("num_elsewhere", [9, 0, None])
def test_the_inputs_of_all_processes_are_averaged(num_elsewhere):
    """Two processes with 3 and `num_elsewhere` tokens equal one with all of them; None is a layer
    that no batch of the other process reached."""
    here, elsewhere, alone = (made(PRILoRA(rank=4, prune_every=1)).train() for _ in range(3))
    layers = (here, elsewhere, alone)
    for layer in layers:
        perturb(layer)
    for step in range(2):
        x = torch.randn(3 + (num_elsewhere or 0), 57)
        for layer in layers:
            layer.method.begin_step(info(step))
        here.update(x[:3])
        if num_elsewhere is not None:
            elsewhere.update(10 * x[3:])
        alone.update(torch.cat([x[:3], 10 * x[3:]]))
        sending = SendingAccess()
        elsewhere.method.after_step(sending, info(step))
        receiving = ReceivingAccess(sending.sent)
        here.method.after_step(receiving, info(step))
        assert next(receiving.sent, None) is None
        alone.method.after_step(PlainAccess(), info(step))
    path = "blocks.0.linear"
    found, expected = here.method.activity[path], alone.method.activity[path]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(here.a == 0, alone.a == 0)


@pytest.mark.parametrize("inputs", [None, torch.zeros(0, 57)])
def test_a_layer_without_tokens_is_not_pruned(inputs):
    layer = perturb(made(PRILoRA(rank=4, prune_every=1))).train()
    before = layer.a.detach().clone()
    layer.method.begin_step(info(0))
    if inputs is not None:
        layer.update(inputs)
    layer.method.before_step(PlainAccess(), info(0))
    layer.method.after_step(PlainAccess(), info(0))
    assert torch.equal(layer.a, before)
    assert not layer.method.activity


def test_a_skipped_step_is_neither_averaged_nor_pruned():
    layer = perturb(made(PRILoRA(rank=4, prune_every=1))).train()
    before = layer.a.detach().clone()
    layer.method.begin_step(info(0))
    layer.update(torch.randn(5, 57))
    layer.method.after_step(PlainAccess(), info(0, skipped=True))
    assert torch.equal(layer.a, before)
    assert not layer.method.activity
    layer.method.after_step(PlainAccess(), info(0))
    assert (layer.a == 0).sum() == 4 * 28


# -- frozen masks and optimizer state --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reset_momentum", [True, False])
def test_a_frozen_mask_keeps_the_zeros_of_the_last_pruning(directory, dtype, reset_momentum):
    settings = PRILoRA(**PRUNING, freeze_mask=True, reset_momentum=reset_momentum)
    run = bench(directory, settings, dtype=dtype, weight_decay=0.1)
    after_pruning = {(32, 64), (64, 128)}
    for done in range(1, 10):
        run.step()
        assert (zeros(run) == after_pruning) == (done in (3, 6, 9))
    layers = run.attached.layers.values()
    masks = [layer.a == 0 for layer in layers]
    for _ in range(4):
        before = [run.engine.read(layer.a) for layer in layers]
        run.step()
        assert zeros(run) == after_pruning
        for layer, mask, then in zip(layers, masks, before, strict=True):
            assert torch.equal(layer.a == 0, mask)
            assert (run.engine.read(layer.a) != then)[~mask].float().mean() > 0.99


def test_masked_entries_do_not_count_in_the_gradient_norm(directory):
    norms = {}

    class Watching(PRILoRAMethod):
        def before_step(self, access, step):
            super().before_step(access, step)
            gradients = {p: access.gradient(p) for x in self.layers.values() for p in (x.a, x.b)}
            for layer in self.layers.values():
                if step.step >= 9:
                    assert not gradients[layer.a][layer.a == 0].any()
            norms[step.step] = torch.cat([g.flatten() for g in gradients.values()]).norm().item()

    run = bench(directory, PRILoRA(**PRUNING, freeze_mask=True), Watching)
    for _ in range(11):
        run.step()
    assert run.result.grad_norm == pytest.approx(norms[10], rel=1e-5)


@pytest.mark.parametrize("resets", [True, False])
def test_adams_moments_of_pruned_entries_are_cleared(directory, resets):
    run = bench(directory, PRILoRA(**PRUNING, reset_momentum=resets))
    for _ in range(3):
        run.step()
    for layer in run.attached.layers.values():
        moments = run.optimizer.inner.state[run.optimizer.fp32_copy(layer.a)]
        pruned = layer.a == 0
        for name in ("exp_avg", "exp_avg_sq"):
            assert moments[name][pruned].any() == (not resets)
            assert moments[name][~pruned].all()


# -- LoRA, resuming, planning ----------------------------------------------------------------------


def test_with_equal_ranks_and_no_pruning_it_equals_lora_to_the_bit(directory):
    constant = PRILoRA(first_rank=4, last_rank=4, alpha=8, prune_share=0.0, prune_every=2)
    run = bench(directory, constant)
    lora = bench(directory, LoRA(rank=4, alpha=8), LoRAMethod)
    assert [run.step() for _ in range(5)] == [lora.step() for _ in range(5)]
    found, expected = run.attached.state(), lora.attached.state()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_the_adapter_is_settled_after_the_first_pruning():
    method = PRILoRAMethod(PRILoRA(prune_every=4))
    assert [method.is_settled(done, 12) for done in (0, 3, 4, 12)] == [False, False, True, True]
    assert method.is_settled(0, 3)  # too short for a pruning
    assert PRILoRAMethod(PRILoRA(prune_every=4, prune_share=0.0)).is_settled(0, 12)


@pytest.mark.parametrize(
    ("steps", "freeze_mask"),
    [
        (4, False),
        (10, True),
        pytest.param(4, True, marks=pytest.mark.slow),
        pytest.param(10, False, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(directory, steps, freeze_mask):
    settings = PRILoRA(**PRUNING, freeze_mask=freeze_mask, dropout=0.1)
    how = {"dtype": torch.bfloat16, "weight_decay": 0.1, "checkpointing": True}
    uninterrupted, first = bench(directory, settings, **how), bench(directory, settings, **how)
    losses = [uninterrupted.step() for _ in range(12)]
    for _ in range(steps):
        first.step()
    second = bench(directory, settings, **how, saved=first.attached.state())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.method.load_state_dict(first.method.state_dict())
    second.number = first.number
    assert [second.step() for _ in range(12 - steps)] == losses[steps:]
    found = second.attached.state()
    assert all(torch.equal(found[name], t) for name, t in uninterrupted.attached.state().items())
    expected = uninterrupted.method.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in second.method.state_dict().items())


def test_the_methods_state_is_one_vector_per_layer(directory):
    run = bench(directory, PRILoRA(rank=4))
    assert run.method.state_dict() == {}
    run.step()
    shapes = {name: tuple(v.shape) for name, v in run.method.state_dict().items()}
    assert shapes.keys() == {f"{path}.activity" for path in run.attached.layers}
    assert shapes["model.layers.0.mlp.down_proj.activity"] == (128,)


def test_the_memory_plan_has_two_vectors_besides_the_factors():
    plan = planned(PRILoRA(), [spec(0), spec(11)])[spec(11).path]
    footprint = PRILoRAMethod(PRILoRA()).footprint(spec(11), plan)
    assert (footprint.width, footprint.trained) == (12, 12 * (64 + 48))
    assert (footprint.frozen, footprint.statistics) == (0, 2 * 64)


def test_a_warm_start_needs_a_pair_of_at_most_the_rank_of_the_layer():
    small = perturb(one_layer(LoRA(rank=2, alpha=3), 33, 57, method=LoRAMethod))
    layer = made(PRILoRA(first_rank=3, last_rank=3))
    layer.warm_start(small.factors())
    torch.testing.assert_close(layer.delta(), small.delta())
    large = perturb(one_layer(LoRA(rank=4), 33, 57, method=LoRAMethod))
    with pytest.raises(AdapterError, match=r"first_rank=4"):
        layer.warm_start(large.factors())
