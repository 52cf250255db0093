"""BA-LoRA: the three regularisers, for language modelling and for classification."""

import math

import pytest
import torch
from live_bytes import LiveBytes
from torch.nn import functional as F

from qlora_lite.adapters.method import OutputChunk, Requirement, StepInfo
from qlora_lite.kernels.cross_entropy import linear_cross_entropy
from qlora_lite.memory.formulas import loss_bytes
from qlora_lite.methods.ba_lora import (
    BALoRA,
    BALoRAMethod,
    class_consistency,
    class_covariance,
    class_share,
    frobenius_share,
    singular_values,
    token_consistency,
    top_entropy,
    weights_at,
)
from tests.tiny import save_tiny
from tests.workbench import Bench, batches_of

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DRAW = torch.Generator().manual_seed(0)
Z, TEACHER = torch.randn(9, 30, generator=DRAW), torch.randn(9, 30, generator=DRAW)


def with_gradient(function, *arguments):
    z = Z.clone().requires_grad_()
    value = function(z, *arguments)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


def naive_consistency(z, teacher, temperature):
    """As released: the divergence of the softened distributions, times T^2."""
    total = 0.0
    for row, other in zip(z, teacher, strict=True):
        p, q = F.softmax(row / temperature, 0), F.softmax(other / temperature, 0)
        total = total + sum(q[i] * (q[i].log() - p[i].log()) for i in range(len(q)))
    return temperature * temperature * total / len(z)


def naive_entropy(z, top_k):
    total = 0.0
    for row in z:
        top = row.sort(descending=True).values[:top_k]
        p = F.softmax(top, 0)
        total = total - sum(p[i] * p[i].log() for i in range(top_k))
    return total / len(z)


def naive_frobenius_share(z, k, centred=False):
    if centred:
        z = z - z.mean(0)
    return torch.linalg.svdvals(z)[:k].sum() / z.norm()


def naive_class_covariance(z):
    rows, classes = z.shape
    total = 0.0
    for i in range(classes):
        for j in range(classes):
            if i != j:
                c = sum(
                    (z[r, i] - z[:, i].mean()) * (z[r, j] - z[:, j].mean()) for r in range(rows)
                )
                total = total + (c / (rows - 1)) ** 2
    return total / classes


def naive_class_consistency(z, teacher):
    ours = torch.stack([row / row.norm() for row in z])
    theirs = torch.stack([row / row.norm() for row in teacher])
    return ((ours - theirs) ** 2).mean()


def naive_class_share(z, k):
    values = torch.linalg.svdvals(z)
    return values[:k].sum() / values.sum()


@pytest.mark.parametrize(
    ("ours", "naive", "arguments"),
    [
        (token_consistency, naive_consistency, (TEACHER, 1.0)),
        (token_consistency, naive_consistency, (TEACHER, 2.0)),
        (top_entropy, naive_entropy, (5,)),
        (frobenius_share, naive_frobenius_share, (3,)),
        (frobenius_share, naive_frobenius_share, (3, True)),
        (class_consistency, naive_class_consistency, (TEACHER,)),
        (class_covariance, naive_class_covariance, ()),
        (class_share, naive_class_share, (3,)),
    ],
)
def test_every_term_has_the_value_and_the_gradient_of_its_formula(ours, naive, arguments):
    for found, expected in zip(
        with_gradient(ours, *arguments), with_gradient(naive, *arguments), strict=True
    ):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("shape", [(9, 30), (30, 9)])
def test_singular_values_come_from_the_smaller_gram_matrix(shape):
    z = torch.randn(shape, generator=DRAW)
    torch.testing.assert_close(singular_values(z), torch.linalg.svdvals(z), **CLOSE)


def test_the_terms_are_within_their_bounds():
    assert 0 <= top_entropy(Z, 30) <= math.log(30)
    assert 0 < class_share(Z, 3) <= 1
    assert 0 < frobenius_share(Z, 3) <= math.sqrt(3)
    assert class_covariance(Z) >= 0
    assert class_covariance(Z[:, :1]) == 0
    assert token_consistency(Z, Z) == pytest.approx(0, abs=1e-6)
    assert class_consistency(Z[:, :1], 2 * Z[:, :1]) > 0


def test_equal_rows_have_finite_gradients():
    z = torch.ones(4, 6, requires_grad=True)
    for term in (frobenius_share(z, 3), class_share(z, 3), class_covariance(z)):
        (gradient,) = torch.autograd.grad(term, z)
        assert gradient.isfinite().all()


def method_with(**settings):
    return BALoRAMethod(BALoRA(**settings))


def at_step(method, step, total):
    method.begin_step(StepInfo(step, total, 1e-3, torch.Generator()))
    return method


def test_the_defaults_are_the_constants_of_the_release():
    settings = BALoRA()
    assert (settings.consistency, settings.diversity, settings.singular) == (0.025, 0.005, 0.005)
    assert (settings.num_singular, settings.top_k, settings.temperature) == (10, 20, 2.0)
    assert (settings.schedule, settings.centred) == ("release", False)


@pytest.mark.parametrize(
    ("step", "factors"),
    [
        (0, (1.0, 0.0, 0.0)),
        (40, (0.1 + 0.9 * (1 + math.cos(0.2 * math.pi)) / 2, 0.0, 0.0)),
        (45, (0.1 + 0.9 * (1 + math.cos(0.225 * math.pi)) / 2, 0.5, 0.5)),
        (50, (0.1 + 0.9 * (1 + math.cos(0.25 * math.pi)) / 2, 1.0, 1.0)),
        (100, (0.55, 1.0, 1.0)),
        (200, (0.1, 1.0, 1.0)),
    ],
)
def test_the_weights_follow_the_released_schedules(step, factors):
    wanted = [
        factor * weight for factor, weight in zip(factors, (0.025, 0.005, 0.005), strict=True)
    ]
    assert list(weights_at(BALoRA(), step, 200)) == pytest.approx(wanted)
    constant = BALoRA(schedule="constant")
    assert weights_at(constant, step, 200) == (0.025, 0.005, 0.005)


@pytest.mark.parametrize("total", [1, 7, 20, 33, 100])
def test_short_runs_round_the_schedule_as_released(total):
    delay, ramp = int(0.2 * total), max(int(0.05 * total), 1)
    for step in range(total):
        if step < delay:
            factor = 0.0
        elif step < delay + ramp:
            factor = (step - delay) / ramp
        else:
            factor = 1.0
        assert weights_at(BALoRA(), step, total).diversity == 0.005 * factor


def test_the_loss_is_the_released_formula_with_the_weights_of_the_step():
    method, chunk = method_with(num_singular=3, top_k=5), OutputChunk(Z, torch.zeros(9), TEACHER)
    for step in (0, 45, 199):
        l1, l2, l3 = weights_at(method.settings, step, 200)
        expected = (
            l1 * naive_consistency(Z, TEACHER, 2.0)
            - l2 * naive_entropy(Z, 5)
            - l3 * naive_frobenius_share(Z, 3)
        )
        found = at_step(method, step, 200).output_loss(chunk)
        torch.testing.assert_close(found, 9 * expected, **CLOSE)


def test_the_logits_are_not_centred():
    shifted = Z + 5 * torch.randn(30, generator=torch.Generator().manual_seed(3))
    assert frobenius_share(shifted, 1) > 0.9  # the common direction dominates
    torch.testing.assert_close(
        frobenius_share(shifted, 1, centred=True), frobenius_share(Z, 1, centred=True), **CLOSE
    )


def test_before_the_first_step_all_terms_are_computed():
    """The memory dry run comes before the first step, in which two of the terms are off."""
    method = method_with()
    assert method.weights == (0.025, 0.005, 0.005)
    assert at_step(method, 0, 20).weights == (0.025, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [False, True])
def test_the_plan_covers_the_peak_of_the_loss(dtype, centred):
    tokens, hidden, vocabulary, chunk = 256, 32, 4000, 128
    method = method_with(centred=centred)
    head, teacher = torch.randn(vocabulary, hidden).to(dtype), torch.randn(tokens, hidden).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,))

    def extra(logits, targets, teacher_rows):
        return method.output_loss(OutputChunk(logits, targets, teacher_rows @ head.T))

    with LiveBytes([head, teacher, targets]) as live:
        states = torch.randn(tokens, hidden, dtype=dtype).requires_grad_()
        linear_cross_entropy(
            states, targets, lambda h: h @ head.T, extra, extra_inputs=teacher, chunk_tokens=chunk
        )
    itemsize, copies = dtype.itemsize, method.logit_copies
    planned = loss_bytes(tokens, chunk, vocabulary, hidden, itemsize, copies)
    assert 0.99 <= planned / live.peak < 1.05


def test_a_resumed_run_has_the_same_weights_and_bits(tmp_path):
    directory = save_tiny(tmp_path / "base")
    settings = BALoRA(rank=4, alpha=4, consistency=0.3, diversity=0.3, singular=0.3)
    whole = Bench(directory, settings)
    for _ in range(7):
        whole.step()  # the diversity is turned on in the sixth of 20 steps
    first = Bench(directory, settings)
    for _ in range(4):
        first.step()
    saved = {name: value.clone() for name, value in first.attached.state().items()}
    second = Bench(directory, settings, saved=saved)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.number = first.number
    for _ in range(3):
        second.step()
    assert second.method.weights == whole.method.weights
    assert second.result.added == whole.result.added
    for name, value in whole.attached.parameters().items():
        assert torch.equal(value, second.attached.parameters()[name])


def test_only_rows_whose_target_is_a_class_are_regularised():
    method = method_with(classes=[3, 8], consistency=0, singular=0, diversity=1.0)
    targets = torch.tensor([3, 8, 5, 3, 3, 8, 5, 5, 8])
    is_label = targets != 5
    expected = class_covariance(Z[is_label][:, [3, 8]]) * 6
    found = method.output_loss(OutputChunk(Z, targets))
    torch.testing.assert_close(found, expected)
    nowhere = torch.full((9,), 5)
    assert method.output_loss(OutputChunk(Z, nowhere)) is None


def test_the_teacher_is_required_only_with_a_consistency_loss():
    assert method_with().requires is Requirement.TEACHER_OUTPUT
    assert method_with(consistency=0).requires is Requirement.NONE
    none = method_with(consistency=0, diversity=0, singular=0)
    assert none.output_loss(OutputChunk(Z, torch.zeros(9))) is None


def test_the_consistency_loss_is_zero_at_the_start_and_then_positive(tmp_path):
    settings = BALoRA(rank=4, alpha=4, consistency=100.0, diversity=0, singular=0)
    bench = Bench(save_tiny(tmp_path / "base"), settings)
    bench.step()
    assert bench.result.added == 0.0
    bench.step()
    assert bench.result.added > 0.0


def test_a_large_consistency_weight_keeps_the_outputs_close_to_the_base(tmp_path):
    directory = save_tiny(tmp_path / "base")
    away = []
    for consistency in (0.0, 30.0):
        settings = BALoRA(rank=4, alpha=4, consistency=consistency, diversity=0, singular=0)
        bench = Bench(directory, settings, lr=3e-3)
        start = bench.logits()
        for _ in range(10):
            bench.step()
        away.append((bench.logits() - start).norm().item())
    assert away[1] < 0.7 * away[0]


def test_the_logits_of_the_teacher_have_no_gradient(tmp_path):
    seen = []

    class Watching(BALoRAMethod):
        def output_loss(self, chunk):
            seen.append((chunk.logits.requires_grad, chunk.teacher_logits.requires_grad))
            return super().output_loss(chunk)

    Bench(save_tiny(tmp_path / "base"), BALoRA(rank=4), method=Watching).step()
    assert set(seen) == {(True, False)}


def test_the_teacher_is_the_base_with_its_own_head_while_a_head_is_trained(tmp_path):
    seen = []

    class Watching(BALoRAMethod):
        def output_loss(self, chunk):
            seen.append(chunk.teacher_logits)
            return super().output_loss(chunk)

    settings = BALoRA(rank=4, train_modules=["lm_head"])
    bench = Bench(save_tiny(tmp_path / "base"), settings, method=Watching, repeats_data=True)
    expected = []
    with torch.no_grad():
        for batch in batches_of(step=0, rows=2):
            hidden = bench.model.hidden(batch.input_ids, batch.position_ids)
            expected.append(bench.model.logits(hidden[batch.targets >= 0]))
    for _ in range(3):
        bench.step()
    for teacher_logits in seen:  # twice for each batch: a trained head's loss is recomputed
        assert any(torch.allclose(teacher_logits, logits, **CLOSE) for logits in expected)
