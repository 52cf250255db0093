"""MoRA: a square matrix between compression and decompression, and the restarts of ReMoRA."""

import math
from dataclasses import asdict

import pytest
import torch
from pydantic import ValidationError

from qlora_lite.adapters.layer import Factors
from qlora_lite.adapters.method import StepInfo
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.mora import MoRA, MoRALayer, MoRAMethod, side_of_square
from qlora_lite.model.quant import FP32
from qlora_lite.model.targets import LinearSpec
from qlora_lite.training import checkpoint
from qlora_lite.training.loop import Progress
from tests.tiny import save_tiny
from tests.workbench import CLOSE, Bench, one_layer, perturb

SHAPES = {
    "square": (16, 16, 1),
    "divisible": (8, 8, 1),
    "wide": (33, 57, 1),
    "tall": (57, 33, 1),
    "very wide": (10, 40, 1),
    "very tall": (40, 10, 1),
    "one block": (12, 12, 50),
    "narrow": (50, 3, 4),
    "flat": (3, 50, 4),
}
"""(d_out, d_in, rank)"""

every = pytest.mark.parametrize("kind", [1, 2, 6])
each = pytest.mark.parametrize("shape", SHAPES)


def made(kind, shape="wide", **how):
    """A layer of any type, including type 2, which otherwise only a restart makes."""
    d_out, d_in, rank = SHAPES[shape]
    settings = MoRA(rank=rank, type=6 if kind == 6 else 1)
    layer = one_layer(settings, d_out, d_in, FP32(), method=MoRAMethod, **how)
    return MoRALayer(layer.base, len(layer.m), 2) if kind == 2 else layer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def bench(directory, **settings):
    how = {name: settings.pop(name) for name in ("dtype", "saved") if name in settings}
    settings = {"rank": 2, "type": 1} | settings
    return Bench(directory, MoRA(**settings), method=MoRAMethod, **how)


# -- the formulas, number by number ----------------------------------------------------------------


def naive(m, x, d_out, kind):
    """f_dec(M f_comp(x)) of one token, as a list of its d_out numbers."""
    r_hat, d_in = len(m), len(x)
    if kind == 6:
        outputs = []
        for i in range(math.ceil(d_in / r_hat)):
            block = [x[(i * r_hat + k) % d_in] for k in range(r_hat)]
            outputs += times(m, rotated(block, i))
        return [outputs[j % len(outputs)] for j in range(d_out)]
    if kind == 1:
        width = math.ceil(d_in / r_hat) * r_hat
        z = [sum(x[j % d_in] for j in range(i, width, r_hat)) for i in range(r_hat)]
        outputs = times(m, z)
        return [outputs[j % r_hat] for j in range(d_out)]
    z = [sum(x[j] for j in range(d_in) if group(j, d_in, r_hat) == i) for i in range(r_hat)]
    outputs = times(m, z)
    return [outputs[group(j, d_out, r_hat)] for j in range(d_out)]


def rotated(block, i):
    half = len(block) // 2
    left, right = [], []
    for k in range(half):
        angle = i * 10000 ** (-2 * k / len(block))
        cos, sin = math.cos(angle), math.sin(angle)
        left.append(cos * block[k] - sin * block[k + half])
        right.append(cos * block[k + half] + sin * block[k])
    return left + right


def group(j, width, num):
    """The group of feature j among `num` groups of neighbours; the first ones are one longer."""
    ends = [(i + 1) * (width // num) + min(i + 1, width % num) for i in range(num)]
    return next(i for i in range(num) if j < ends[i])


def times(m, z):
    return [sum(m[i, j] * z[j] for j in range(len(z))) for i in range(len(m))]


def naive_dense(m, d_out, d_in, kind):
    """The same as a matrix, column by column from unit vectors."""
    unit = torch.eye(d_in, dtype=torch.float64)
    columns = [torch.stack(naive(m.double(), unit[j], d_out, kind)) for j in range(d_in)]
    return torch.stack(columns, 1).float()


@every
@each
def test_values_and_gradients_are_those_of_the_formulas(kind, shape):
    layer = perturb(made(kind, shape), size=0.3)
    d_out, d_in, _ = SHAPES[shape]
    x = torch.randn(2, d_in, requires_grad=True)
    weights = torch.randn(2, d_out)
    exact_x, exact_m = x.detach().double().requires_grad_(), layer.m.detach().double()
    exact_m.requires_grad_()
    expected = torch.stack([torch.stack(naive(exact_m, token, d_out, kind)) for token in exact_x])
    found = layer.update(x)
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    torch.testing.assert_close(layer(x), layer.base(x) + found, **CLOSE)
    wanted = torch.autograd.grad((expected * weights).sum(), [exact_x, exact_m])
    gradients = torch.autograd.grad((found * weights).sum(), [x, layer.m])
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@every
@each
def test_the_delta_equals_the_formula_and_the_forward(kind, shape):
    layer = perturb(made(kind, shape), size=0.3)
    d_out, d_in, _ = SHAPES[shape]
    torch.testing.assert_close(layer.delta(), naive_dense(layer.m, d_out, d_in, kind), **CLOSE)
    x = torch.randn(3, 5, d_in)
    torch.testing.assert_close(layer.update(x), x @ layer.delta().T, **CLOSE)


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_output_equals_the_base_bit_for_bit_and_m_has_a_gradient(kind, dtype):
    layer = made(kind, dtype=dtype)
    x = torch.randn(3, 5, 57)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).square().sum().backward()
    assert layer.m.grad.all()


# -- the square ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "d_in", "d_out", "kind", "r_hat"),
    [
        (8, 4096, 4096, 6, 256),
        (8, 4096, 4096, 1, 256),
        (256, 4096, 4096, 1, 1448),
        (1, 16, 16, 1, 6),  # 5.66: the paper rounds down, the released code to nearest
        (1, 57, 33, 1, 9),  # 9.49
        (1, 57, 33, 6, 8),
        (1, 39, 25, 6, 8),
        (50, 12, 14, 1, 12),
        (50, 13, 14, 6, 12),
        (4, 3, 50, 1, 3),
        (4, 3, 50, 6, 2),
    ],
)
def test_the_side_of_the_square(rank, d_in, d_out, kind, r_hat):
    assert side_of_square(rank, d_in, d_out, kind) == r_hat


@pytest.mark.parametrize(
    ("kind", "restart_every", "wide"), [(1, None, 9), (6, None, 40), (1, 9, 9)]
)
def test_the_count_and_the_memory_plan_match_the_tensors(kind, restart_every, wide):
    settings = MoRA(rank=1, type=kind, restart_every=restart_every, restart_warmup=0)
    layer = one_layer(settings, 33, 57, method=MoRAMethod)
    r_hat = 8 if kind == 6 else 9
    assert {name: tuple(p.shape) for name, p in layer.trained().items()} == {"m": (r_hat, r_hat)}
    assert layer.trainable_count() == r_hat**2
    footprint = layer.method.footprint(
        LinearSpec("blocks.0.linear", 57, 33, 0, 1, "other"), layer.plan
    )
    assert footprint.trained == r_hat**2
    assert footprint.statistics == (2 * r_hat**2 if restart_every else 0)
    assert footprint.width == wide == layer.compress(torch.zeros(57), kind).numel()


def test_alpha_scaling_and_lr_ratio_have_no_effect(directory):
    plain = bench(directory)
    other = bench(directory, alpha=1.0, scaling="alpha/sqrt(r)", lr_ratio=16.0)
    assert [plain.step() for _ in range(3)] == [other.step() for _ in range(3)]


# -- type 6 ----------------------------------------------------------------------------------------


def test_the_rotation_keeps_the_norm_of_every_block_and_does_not_change_the_first():
    layer = made(6)
    x = torch.randn(4, 57)
    blocks = layer.compress(x, 6)
    plain = x[:, :40].view(4, 5, 8)
    assert torch.equal(blocks[:, 0], plain[:, 0])
    assert not torch.isclose(blocks[:, 1:], plain[:, 1:]).all(-1).any()
    torch.testing.assert_close(blocks.norm(dim=-1), plain.norm(dim=-1), **CLOSE)


def test_type_6_does_not_use_inputs_after_the_last_output():
    layer = perturb(made(6, "very wide"))
    x = torch.randn(4, 40)
    other = x.clone()
    other[:, 12:] += 1  # two blocks of 6 reach the 10 outputs
    assert torch.equal(layer.update(x), layer.update(other))
    other[:, 11] += 1
    assert not torch.equal(layer.update(x), layer.update(other))


@pytest.mark.parametrize(("d_in", "d_out"), [(57, 1), (1, 33)])
def test_a_layer_too_narrow_to_rotate_is_an_error_with_the_layer(d_in, d_out):
    assert one_layer(MoRA(type=1), d_out, d_in, method=MoRAMethod).m.shape == (1, 1)
    with pytest.raises(AdapterError, match=r"blocks\.0\.linear maps .*adapter\.type=1"):
        one_layer(MoRA(type=6), d_out, d_in, method=MoRAMethod)


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [1, 2])
@each
def test_sharing_is_exported_as_a_lora_of_rank_r_hat(kind, shape):
    layer = perturb(made(kind, shape), size=0.3)
    pair = layer.factors()
    r_hat = len(layer.m)
    assert pair.rank == r_hat
    assert pair.relative_error == 0
    assert torch.linalg.matrix_rank(layer.delta()) == r_hat
    torch.testing.assert_close(pair.up @ pair.down, layer.delta(), **CLOSE)
    assert torch.equal(layer.factors(rank=r_hat).up, pair.up)


def test_rotation_has_a_rank_above_r_hat_and_is_not_exported_as_a_pair():
    layer = perturb(made(6), size=0.3)
    assert torch.linalg.matrix_rank(layer.delta()) == 33 > len(layer.m)
    assert layer.factors() is None
    assert layer.live_factors() is None


@every
def test_a_smaller_rank_gives_the_nearest_pair_and_its_error(kind):
    layer = perturb(made(kind), size=0.3)
    delta = layer.delta()
    pair = layer.factors(rank=5)
    assert pair.rank == 5
    missed = (delta - pair.up @ pair.down).norm() / delta.norm()
    assert pair.relative_error == pytest.approx(missed.item(), rel=1e-4)
    # Eckart and Young: no pair of rank 5 misses less than the other singular values
    values = torch.linalg.eigvalsh(delta @ delta.T).flip(0)
    least = (values[5:].sum() / values.sum()).sqrt().item()
    assert pair.relative_error == pytest.approx(least, rel=1e-4)
    assert 0 < pair.relative_error < 1
    full = layer.factors(rank=33)
    assert full.relative_error == 0
    torch.testing.assert_close(full.up @ full.down, delta, **CLOSE)


def test_an_update_of_zero_has_no_relative_error():
    assert made(6).factors(rank=4).relative_error == 0


def test_a_warm_start_from_a_lora_is_an_error():
    with pytest.raises(AdapterError, match="cannot start from a plain LoRA"):
        made(1).warm_start(Factors(torch.zeros(2, 57), torch.zeros(33, 2)))


# -- ReMoRA ----------------------------------------------------------------------------------------


def watched(it, seen):
    """Append M, its type and the logits before and after every restart of the bench to `seen`."""
    after_step = it.method.after_step
    layer = it.attached.layers["model.layers.0.mlp.up_proj"]

    def restart(access, step):
        before = (layer.m.detach().clone(), layer.cycle[layer.turn], it.logits())
        num = len(layer.finished)
        after_step(access, step)
        if len(layer.finished) > num:
            seen.append((*before, it.logits()))

    it.method.after_step = restart
    return layer


def test_the_rate_rises_again_after_every_restart():
    method = MoRAMethod(MoRA(restart_every=2000))
    found = [method.lr_scale(step, 10_000) for step in (0, 49, 1999, 2000, 2001, 2049, 2050, 4000)]
    assert found == [1, 1, 1, 1 / 51, 2 / 51, 50 / 51, 1, 1 / 51]
    at_once = MoRAMethod(MoRA(restart_every=4, restart_warmup=0))
    assert {at_once.lr_scale(step, 100) for step in range(20)} == {1.0}
    assert {MoRAMethod(MoRA()).lr_scale(step, 100) for step in range(100)} == {1.0}


@pytest.mark.parametrize("warmup", [50, 4])
def test_a_warmup_that_does_not_end_before_the_next_restart_is_an_error(warmup):
    with pytest.raises(ValidationError, match=f"restart_warmup={warmup} does not end"):
        MoRA(restart_every=4, restart_warmup=warmup)
    MoRA(restart_every=warmup + 1, restart_warmup=warmup)


@pytest.mark.parametrize(("kind", "cycle"), [(1, [1, 2, 1]), (6, [6, 1, 6])])
def test_a_restart_zeroes_m_clears_its_moments_and_changes_the_type(directory, kind, cycle):
    it = bench(directory, type=kind, restart_every=2, restart_warmup=0, dtype=torch.bfloat16)
    layers = it.attached.layers.values()
    for step in range(1, 7):
        it.step()
        done = step // 2
        for layer in layers:
            assert layer.finished.tolist() == cycle[:done]
            image = it.optimizer.fp32_copy(layer.m)
            assert image is not layer.m
            is_new = step % 2 == 0
            assert (not layer.m.any()) == (not image.any()) == is_new
            assert (image not in it.optimizer.inner.state) == is_new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [1, 6])
def test_a_restart_does_not_change_the_outputs(directory, kind, dtype):
    it = bench(directory, type=kind, restart_every=2, restart_warmup=0, dtype=dtype)
    seen = []
    watched(it, seen)
    bare = it.logits()
    for _ in range(6):
        it.step()
    assert len(seen) == 3
    for m, _, before, after in seen:
        assert m.any()
        assert (before - bare).abs().max() > 0.01
        torch.testing.assert_close(after, before, **CLOSE)


@pytest.mark.parametrize("kind", [1, 6])
def test_the_delta_is_the_sum_of_the_finished_matrices_by_type(directory, kind):
    it = bench(directory, type=kind, restart_every=2, restart_warmup=0)
    seen = []
    layer = watched(it, seen)
    for _ in range(9):
        it.step()
    links = [(m, used) for m, used, *_ in seen] + [(layer.m, 6 if kind == 6 else 1)]
    assert [used for _, used in links] == [kind, 2 if kind == 1 else 1] * 2 + [kind]
    d_out, d_in = layer.base.d_out, layer.base.d_in
    expected = sum(naive_dense(m.detach(), d_out, d_in, used) for m, used in links)
    torch.testing.assert_close(layer.delta(), expected, **CLOSE)
    x = torch.randn(4, d_in)
    layer.train(False)
    torch.testing.assert_close(layer.update(x), x @ expected.T, **CLOSE)


def test_the_sum_of_two_types_is_exported_as_a_pair_of_their_ranks(directory):
    it = bench(directory, restart_every=3, restart_warmup=0)
    layers = it.attached.layers.values()
    for step, types in ((2, 1), (3, 2), (5, 2), (9, 2)):
        while it.number < step:
            it.step()
        for layer in layers:
            pair = layer.factors()
            assert pair.rank == types * len(layer.m)
            assert pair.relative_error == 0
            torch.testing.assert_close(pair.up @ pair.down, layer.delta(), **CLOSE)
    for layer in layers:
        assert torch.linalg.matrix_rank(layer.delta()) > len(layer.m)


def test_rotation_with_sharing_is_not_exported_as_a_pair(directory):
    it = bench(directory, type=6, restart_every=1, restart_warmup=0)
    it.step()
    assert all(layer.factors() is None for layer in it.attached.layers.values())


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_loaded_layer_has_the_same_outputs(directory, kind, steps):
    settings = {"type": kind, "restart_every": 2, "restart_warmup": 0}
    it = bench(directory, **settings)
    for _ in range(steps):
        it.step()
    again = bench(directory, **settings, saved=it.attached.state())
    assert torch.equal(again.logits(), it.logits())
    for path, layer in it.attached.layers.items():
        assert torch.equal(again.attached.layers[path].delta(), layer.delta())


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_a_resumed_run_ends_with_the_same_bits(directory, tmp_path, steps):
    settings = {"restart_every": 3, "restart_warmup": 1, "dropout": 0.1}
    uninterrupted, first = bench(directory, **settings), bench(directory, **settings)
    losses = [uninterrupted.step() for _ in range(8)]
    for _ in range(steps):
        first.step()
    state = checkpoint.TrainingState(
        first.attached.state(),
        first.optimizer.state_dict(),
        first.method.state_dict(),
        asdict(Progress(step=steps)),
    )
    saved = checkpoint.load(checkpoint.save(tmp_path, steps, state, keep=1))
    second = bench(directory, **settings, saved=saved.adapter)
    second.optimizer.load_state_dict(saved.engine)
    second.method.load_state_dict(saved.method)
    second.number = steps
    assert [second.step() for _ in range(8 - steps)] == losses[steps:]
    found = second.attached.state()
    assert all(torch.equal(found[name], t) for name, t in uninterrupted.attached.state().items())


def test_without_a_restart_remora_equals_mora_to_the_bit(directory):
    plain, never = bench(directory), bench(directory, restart_every=2000)
    assert [plain.step() for _ in range(4)] == [never.step() for _ in range(4)]
    for path, layer in plain.attached.layers.items():
        assert torch.equal(layer.m, never.attached.layers[path].m)


def test_a_skipped_step_delays_a_restart(directory):
    it = bench(directory, restart_every=2, restart_warmup=0)
    it.step()
    layer = it.attached.layers["model.layers.0.mlp.up_proj"]
    draws = torch.Generator()
    it.method.after_step(it.engine, StepInfo(1, 20, 1e-2, draws, skipped=True))
    assert layer.finished.tolist() == []
    assert layer.m.any()
    it.method.after_step(it.engine, StepInfo(2, 20, 1e-2, draws))
    assert layer.finished.tolist() == [1]
    it.method.after_step(it.engine, StepInfo(3, 20, 1e-2, draws))
    assert layer.finished.tolist() == [1, 2]


def test_a_run_started_from_a_saved_state_restarts_on_time(directory):
    settings = {"restart_every": 2, "restart_warmup": 0}
    old = bench(directory, **settings)
    for _ in range(5):
        old.step()
    new = bench(directory, **settings, saved=old.attached.state())
    layer = new.attached.layers["model.layers.0.mlp.up_proj"]
    for finished in ([1, 2], [1, 2, 1], [1, 2, 1], [1, 2, 1, 2]):
        new.step()
        assert layer.finished.tolist() == finished


def test_a_small_m_is_not_rounded_away_by_a_large_sum():
    """In bf16, 1 + 0.001 is 1."""
    settings = MoRA(rank=1, type=1, restart_every=9, restart_warmup=0)
    layer = one_layer(settings, 8, 8, FP32(), method=MoRAMethod, dtype=torch.bfloat16)
    layer.finish(torch.ones(4, 4))
    layer.finish(torch.zeros(4, 4))
    layer.m.data[:, 0] = 0.001
    assert layer.sums.dtype is torch.float32
    x = torch.tensor([1.0, -1, 0, 0] * 2, dtype=torch.bfloat16)  # the sum maps it to zero
    torch.testing.assert_close(layer.update(x).float(), torch.full((8,), 0.002), rtol=0.01, atol=0)
