"""DyLoRA: the rank drawn per step, what a step moves, and the adapter of every rank."""

from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from qlora_lite.adapters.method import StepInfo
from qlora_lite.adapters.peft import to_peft
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.seeds import generator
from qlora_lite.methods.dylora import DyLoRA, DyLoRAMethod
from qlora_lite.methods.lora import LoRA, LoRAMethod
from qlora_lite.model.quant import NF4
from tests.tiny import save_tiny
from tests.workbench import CLOSE, Bench, assert_resumes_exactly, one_layer, perturb

SMALL = {"rank": 5, "alpha": 6}


def made(settings=None, d_out=33, d_in=57, **how):
    return one_layer(settings or DyLoRA(**SMALL), d_out, d_in, method=DyLoRAMethod, **how)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def bench(directory, settings, **how):
    return Bench(directory, settings, method=DyLoRAMethod, **how)


def info(step, seed=0):
    return StepInfo(step, 20, 1e-2, generator(seed, "method", step))


def draws(num, **settings):
    layer = made(DyLoRA(**settings), d_out=3, d_in=4)
    found = []
    for step in range(num):
        layer.method.begin_step(info(step))
        found.append(layer.drawn)
    return found


def at_rank(layer, rank):
    """The layer in a training step at `rank`."""
    layer.train()
    layer.drawn = rank
    return layer


def naive(layer, x, rank, alpha=6):
    """y = W x + alpha / b  sum over the first b components of  B[:, i] (A[i] . x)"""
    y = x @ layer.base.dense().T
    for i in range(rank):
        y = y + alpha / rank * torch.outer(x @ layer.a[i], layer.b[:, i])
    return y


# -- the layer -------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_released_glue_script():
    settings = DyLoRA()
    assert (settings.rank, settings.alpha, settings.min_rank) == (8, 16, 1)
    assert (settings.variant, settings.distribution, settings.eval_rank) == (
        "standard",
        "uniform",
        None,
    )


def test_tensors_and_count_are_those_of_a_lora_of_the_largest_rank():
    layer = made()
    assert {n: tuple(t.shape) for n, t in layer.state().items()} == {"a": (5, 57), "b": (33, 5)}
    assert layer.trainable_count() == 5 * (57 + 33)
    assert not layer.b.any()


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_values_and_gradients_at_a_drawn_rank_are_those_of_a_loop(rank):
    layer = at_rank(perturb(made(quant=NF4())), rank)
    x = torch.randn(7, 57, requires_grad=True)
    weights = torch.randn(7, 33)
    expected, found = naive(layer, x, rank), layer(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    tensors = [x, layer.a, layer.b]
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    for got, want in zip(
        torch.autograd.grad((found * weights).sum(), tensors), wanted, strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not wanted[1][rank:].any()
    assert not wanted[2][:, rank:].any()


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_frozen_variant_has_the_same_output_and_gradients_for_one_component_only(rank):
    standard = at_rank(perturb(made()), rank)
    frozen = at_rank(perturb(made(DyLoRA(**SMALL, variant="frozen"))), rank)
    gradients = []
    for layer in (standard, frozen):
        x = torch.ones(4, 57, requires_grad=True)
        y = layer(x)
        gradients.append([y, *torch.autograd.grad(y.square().sum(), [x, layer.a, layer.b])])
    for got, want in zip(gradients[1][:2], gradients[0][:2], strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    a, b = gradients[1][2:]
    only = torch.arange(5) == rank - 1
    torch.testing.assert_close(a, gradients[0][2] * only[:, None], **CLOSE)
    torch.testing.assert_close(b, gradients[0][3] * only, **CLOSE)
    assert a.any()
    assert b.any()


def test_components_above_the_drawn_rank_do_not_affect_the_output():
    layer = at_rank(perturb(made()), 3)
    x = torch.randn(4, 57)
    before = layer(x)
    with torch.no_grad():
        layer.a[3:] += 9
        layer.b[:, 3:] -= 9
    assert torch.equal(layer(x), before)
    assert not torch.equal(at_rank(layer, 4)(x), before)


def test_at_the_largest_rank_it_equals_a_lora_with_the_same_tensors():
    layer = at_rank(perturb(made()), 5)
    lora = one_layer(LoRA(**SMALL), 33, 57, method=LoRAMethod)
    lora.load_state(layer.state())
    x = torch.randn(4, 57)
    assert torch.equal(layer(x), lora(x))
    assert torch.equal(layer.eval()(x), lora.eval()(x))


@pytest.mark.parametrize(("scaling", "scale"), [("alpha/r", 6 / 3), ("alpha/sqrt(r)", 6 / 3**0.5)])
def test_the_scale_is_that_of_the_current_rank(scaling, scale):
    layer = at_rank(perturb(made(DyLoRA(**SMALL, scaling=scaling))), 3)
    x = torch.randn(4, 57)
    expected = scale * x @ layer.a[:3].T @ layer.b[:, :3].T
    torch.testing.assert_close(layer.update(x), expected, **CLOSE)


def test_training_uses_the_drawn_rank_and_evaluation_uses_eval_rank():
    layer = perturb(made(DyLoRA(**SMALL, eval_rank=2)))
    x = torch.randn(4, 57)
    torch.testing.assert_close(at_rank(layer, 4)(x), naive(layer, x, 4), **CLOSE)
    torch.testing.assert_close(layer.eval()(x), naive(layer, x, 2), **CLOSE)
    at_rank(layer, 1)
    torch.testing.assert_close(layer.merged(layer.base.dense()) @ x[0], naive(layer, x, 2)[0])
    assert layer.factors().rank == 2


def test_every_rank_is_exported_as_a_pair_that_equals_its_output():
    layer = perturb(made())
    x = torch.randn(4, 57)
    bare = layer.base(x)
    for rank in range(1, 6):
        pair = layer.factors(rank)
        assert (pair.rank, pair.relative_error) == (rank, 0)
        assert torch.linalg.matrix_rank(pair.up @ pair.down) == rank
        found = bare + x @ (pair.up @ pair.down).T
        torch.testing.assert_close(found, at_rank(layer, rank)(x), **CLOSE)
        evaluated = made(DyLoRA(**SMALL, eval_rank=rank)).eval()
        evaluated.load_state(layer.state())
        torch.testing.assert_close(evaluated(x), found, **CLOSE)
    assert layer.factors().rank == layer.factors(99).rank == 5


def test_a_peft_adapter_has_eval_rank(directory):
    run = bench(directory, DyLoRA(**SMALL, eval_rank=3))
    run.step()
    tensors, config = to_peft(run.attached)
    assert config["r"] == 3
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {3}


def test_a_warm_start_needs_a_pair_of_at_most_eval_rank():
    small = perturb(one_layer(LoRA(rank=2, alpha=3), 33, 57, method=LoRAMethod))
    layer = made(DyLoRA(**SMALL, eval_rank=3))
    layer.warm_start(small.factors())
    torch.testing.assert_close(layer.delta(), small.delta())
    large = perturb(one_layer(LoRA(rank=4), 33, 57, method=LoRAMethod))
    with pytest.raises(AdapterError, match=r"rank 4.*evaluated at rank 3.*eval_rank"):
        layer.warm_start(large.factors())


# -- the draw --------------------------------------------------------------------------------------

HIGHEST_CHI_SQUARE = 24.3
"""Quantile 0.999 for 7 degrees of freedom: a correct draw exceeds it in 1 of 1000 seeds."""


@pytest.mark.parametrize("distribution", ["uniform", "geometric"])
def test_drawn_ranks_follow_their_distribution(distribution):
    num, p = 4000, 0.3
    found = draws(num, rank=8, distribution=distribution, p=p)
    weights = [1.0 if distribution == "uniform" else (1 - p) ** b for b in range(1, 9)]
    expected = [num * w / sum(weights) for w in weights]
    chi_square = sum((found.count(b) - e) ** 2 / e for b, e in enumerate(expected, 1))
    assert chi_square < HIGHEST_CHI_SQUARE


def test_drawn_ranks_are_within_the_range():
    assert set(draws(200, rank=6, min_rank=3)) == {3, 4, 5, 6}
    assert set(draws(20, rank=6, min_rank=6)) == {6}


def test_all_layers_use_one_drawn_rank_limited_by_their_own(directory):
    run = bench(directory, DyLoRA(rank=6, ranks={"q_proj": 2}))
    seen = set()
    for step in range(40):
        run.method.begin_step(info(step))
        narrow = {x.drawn for path, x in run.attached.layers.items() if path.endswith("q_proj")}
        (others,) = {x.drawn for path, x in run.attached.layers.items() if "q_proj" not in path}
        assert narrow == {min(others, 2)}
        seen.add(others)
    assert seen == {1, 2, 3, 4, 5, 6}


def test_all_forwards_of_a_step_use_one_rank(directory):
    seen = []

    class Watching(DyLoRAMethod):
        def begin_step(self, step):
            super().begin_step(step)
            layer = next(iter(self.layers.values()))
            forward = type(layer).update

            def update(x):
                seen.append((step.step, layer.drawn))
                return forward(layer, x)

            layer.update = update

    run = Bench(directory, DyLoRA(rank=6), method=Watching, checkpointing=True)
    for _ in range(8):
        run.step()
    assert len(seen) == 8 * 2 * 2  # two micro-batches, each recomputed in backward
    assert len(set(seen)) == 8
    assert len({rank for _, rank in seen}) > 2


# -- around a step ---------------------------------------------------------------------------------


def values(run):
    """The fp32 copies in the optimizer and the parameters in the layers, by name."""
    kept = {n: run.engine.read(p) for n, p in run.attached.parameters().items()}
    return kept, {n: p.detach().clone() for n, p in run.attached.parameters().items()}


def part(name, tensor, chosen):
    return tensor[chosen] if name.endswith(".a") else tensor[:, chosen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_frozen_variant_changes_the_drawn_component_only(directory, dtype):
    settings = DyLoRA(rank=4, alpha=8, variant="frozen")
    run = bench(directory, settings, dtype=dtype, weight_decay=0.1)
    for _ in range(6):
        before = values(run)
        run.step()
        drawn = next(iter(run.attached.layers.values())).drawn
        others = [i for i in range(4) if i != drawn - 1]
        for then, now in zip(before, values(run), strict=True):
            for name in then:
                assert torch.equal(part(name, now[name], others), part(name, then[name], others))
        for name, value in values(run)[0].items():  # A too, at least by weight decay
            assert not torch.equal(
                part(name, value, [drawn - 1]), part(name, before[0][name], [drawn - 1])
            )


def test_without_restoring_them_momentum_moves_the_other_components(directory):
    class NotRestoring(DyLoRAMethod):
        def after_step(self, access, step):
            self.before = {}

    run = Bench(directory, DyLoRA(rank=4, variant="frozen"), method=NotRestoring)
    moved = False
    for _ in range(6):
        before = values(run)[0]
        run.step()
        drawn = next(iter(run.attached.layers.values())).drawn
        others = [i for i in range(4) if i != drawn - 1]
        moved |= any(
            not torch.equal(part(n, v, others), part(n, before[n], others))
            for n, v in values(run)[0].items()
        )
    assert moved


def test_a_skipped_step_writes_nothing():
    layer = perturb(made(DyLoRA(**SMALL, variant="frozen")))

    class Reading:
        def read(self, parameter):
            return parameter.detach().clone()

    step = info(0)
    layer.method.begin_step(step)
    layer.method.before_step(Reading(), step)
    layer.method.after_step(Reading(), StepInfo(0, 20, 1e-2, step.generator, skipped=True))
    assert not layer.method.before


def test_with_a_single_rank_the_standard_variant_equals_lora_to_the_bit(directory):
    run = bench(directory, DyLoRA(rank=4, alpha=8, min_rank=4))
    lora = Bench(directory, LoRA(rank=4, alpha=8), method=LoRAMethod)
    assert [run.step() for _ in range(5)] == [lora.step() for _ in range(5)]
    found, expected = run.attached.state(), lora.attached.state()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        DyLoRA(rank=4, distribution="geometric", dropout=0.1),
        DyLoRA(rank=4, variant="frozen", min_rank=2),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(directory, settings):
    how = {"dtype": torch.bfloat16, "weight_decay": 0.1}
    assert_resumes_exactly(partial(bench, directory, settings, **how))


# -- the claim of the paper ------------------------------------------------------------------------


def losses_by_rank(method, settings, seed):
    """Train a layer on a delta of rank 8; the error of its first b components for every b."""
    draw = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(16, 8, generator=draw))
    v, _ = torch.linalg.qr(torch.randn(24, 8, generator=draw))
    target = u @ torch.diag(torch.tensor([8.0, 6, 5, 4, 3, 2, 1.5, 1])) @ v.T
    layer = one_layer(settings, 16, 24, method=method, seed=seed)
    optimizer = torch.optim.Adam(layer.trained().values(), lr=2e-2)
    layer.train()
    for step in range(400):
        layer.method.begin_step(info(step, seed))
        x = torch.randn(64, 24, generator=draw)
        loss = F.mse_loss(layer.update(x), x @ target.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    full = layer.factors()
    losses = []
    for rank in range(1, 9):
        pair = layer.factors(rank)
        down, up = (pair.down, pair.up) if pair else (full.down[:rank], full.up[:, :rank])
        losses.append((up @ down - target).norm().item())
    return losses


def test_errors_fall_with_the_rank_and_rank_1_is_better_than_the_first_component_of_a_lora():
    seeds = range(3)
    means = {}
    for name, method, settings in (
        ("lora", LoRAMethod, LoRA(rank=8, alpha=8)),
        ("dylora", DyLoRAMethod, DyLoRA(rank=8, alpha=8)),
    ):
        losses = torch.tensor([losses_by_rank(method, settings, seed) for seed in seeds])
        means[name] = losses.mean(0).tolist()
    for fewer, more in zip(means["dylora"], means["dylora"][1:], strict=False):
        assert more <= fewer * 1.02, means  # on average over seeds, not in every run
    assert means["dylora"][0] < 0.9 * means["lora"][0], means


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"min_rank": 9}, {"eval_rank": 9}, {"p": 1.0}, {"eval_rank": 0}])
def test_settings_outside_their_range_are_an_error(wrong):
    with pytest.raises(ValidationError) as caught:
        DyLoRA(rank=8, **wrong)
    assert next(iter(wrong)) in str(caught.value)


def test_a_layer_with_a_larger_rank_extends_the_range():
    assert DyLoRA(rank=8, eval_rank=12, ranks={"q_proj": 12}).eval_rank == 12


def test_drawn_ranks_do_not_depend_on_the_global_random_stream(tmp_path):
    directory = save_tiny(tmp_path / "base")
    drawn = []
    for other in (1, 2):
        bench = Bench(directory, DyLoRA(rank=8), total=10)
        ranks = []
        for _ in range(10):
            torch.manual_seed(other)
            info = StepInfo(bench.number, 10, 1e-2, generator(0, "method", bench.number))
            bench.method.begin_step(info)
            ranks.append(next(iter(bench.attached.layers.values())).drawn)
            bench.number += 1
        drawn.append(ranks)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 2
