"""RM-LoRA: the orthonormality penalty and the masks drawn in every step."""

from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from qlora_lite.adapters.method import StepInfo
from qlora_lite.foundation.seeds import generator
from qlora_lite.methods.lora import LoRA, LoRAMethod
from qlora_lite.methods.rm_lora import RMLoRA, RMLoRAMethod, distance_from_orthonormal, mask_all_but
from tests.tiny import save_tiny
from tests.workbench import Bench, assert_resumes_exactly, one_layer, perturb

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""fp32 sums of up to 130 numbers below 1, in another order."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def bench(directory, settings, method=RMLoRAMethod, **how):
    return Bench(directory, settings, method=method, **how)


def made(settings, d_out=33, d_in=57, **how):
    return one_layer(settings, d_out, d_in, method=RMLoRAMethod, **how)


class Watching(RMLoRAMethod):
    """Records all gradients of every step before and after masking."""

    def __init__(self, settings):
        super().__init__(settings)
        self.seen = []

    def before_step(self, access, step):
        before = self._gradients(access)
        super().before_step(access, step)
        self.seen.append((before, self._gradients(access)))

    def _gradients(self, access):
        return {
            f"{path}.{name}": access.gradient(parameter).clone()
            for path, layer in self.layers.items()
            for name, parameter in layer.trained().items()
        }


def trained_components(name, gradient):
    """The components with a nonzero gradient."""
    return frozenset(gradient.any(dim=1 if name.endswith(".a") else 0).nonzero().flatten().tolist())


def of_component(name, tensor, chosen):
    return tensor[chosen] if name.endswith(".a") else tensor[:, chosen]


# -- the penalty -----------------------------------------------------------------------------------


def naive_distance(vectors):
    """Frobenius norm of (all dot products) - 1, number by number."""
    total = 0.0
    for i, u in enumerate(vectors):
        for j, v in enumerate(vectors):
            total = total + ((u * v).sum() - (1.0 if i == j else 0.0)) ** 2
    return total**0.5


def test_the_penalty_has_the_value_and_gradients_of_the_formula(directory):
    run = bench(directory, RMLoRA(rank=4, orthogonality=0.3))
    for layer in run.attached.layers.values():
        perturb(layer, 0.3)
    parameters = run.attached.parameters()
    distances = [
        naive_distance(list(p) if name.endswith(".a") else list(p.T))
        for name, p in parameters.items()
    ]
    expected = 0.3 * sum(distances) / len(distances)
    found = run.method.penalty()
    torch.testing.assert_close(found, expected, **CLOSE)
    wanted = torch.autograd.grad(expected, list(parameters.values()))
    ours = torch.autograd.grad(found, list(parameters.values()))
    assert all(gradient.any() for gradient in ours)
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_the_distance_is_zero_for_orthonormal_rows():
    rows, _ = torch.linalg.qr(torch.randn(40, 6))
    assert distance_from_orthonormal(rows.T) < 3e-6  # rounding of 36 dot products, and the 1e-6
    assert distance_from_orthonormal(2 * rows.T) == pytest.approx(3 * 6**0.5, rel=1e-5)


def test_exactly_orthonormal_rows_have_a_gradient_of_zero():
    rows = torch.eye(3, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(distance_from_orthonormal(rows), rows)
    assert torch.equal(gradient, torch.zeros(3, 7))


def test_for_b_zero_the_distance_is_the_root_of_the_rank_without_a_gradient():
    layer = made(RMLoRA(rank=9, orthogonality=1.0))
    of_b = distance_from_orthonormal(layer.b.T)
    assert of_b.item() == pytest.approx(3.0)
    assert not torch.autograd.grad(of_b, layer.b)[0].any()
    a, b = torch.autograd.grad(layer.method.penalty(), [layer.a, layer.b])
    assert a.isfinite().all()
    assert a.any()
    assert not b.any()


def test_there_is_no_penalty_of_weight_zero():
    assert made(RMLoRA(orthogonality=0.0)).method.penalty() is None


def test_the_penalty_is_computed_once_per_step(directory):
    calls = []

    class Counting(RMLoRAMethod):
        def penalty(self):
            calls.append(1)
            return super().penalty()

    run = bench(directory, RMLoRA(rank=4), Counting)
    for _ in range(3):
        run.step()
    assert len(calls) == 3  # with two micro-batches each


def test_the_penalty_makes_the_rows_of_a_more_orthonormal(directory):
    ends = []
    for weight in (0.0, 1.0):
        run = bench(directory, RMLoRA(rank=4, orthogonality=weight, num_drawn=4))
        for _ in range(15):
            run.step()
        found = [distance_from_orthonormal(x.a).item() for x in run.attached.layers.values()]
        ends.append(sum(found) / len(found))
    assert ends[1] < 0.7 * ends[0]


# -- the masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_from_the_second_step_on_k_components_keep_their_gradient(directory, variant):
    run = bench(directory, RMLoRA(rank=6, num_drawn=2, variant=variant), Watching)
    for _ in range(5):
        run.step()
    first, *later = run.method.seen
    assert all(torch.equal(first[0][name], g) for name, g in first[1].items())
    for before, after in later:
        for name, gradient in after.items():
            kept = trained_components(name, gradient)
            assert len(kept) == 2
            assert trained_components(name, before[name]) == set(range(6))
            chosen = sorted(kept)
            got, want = (of_component(name, g, chosen) for g in (gradient, before[name]))
            assert torch.equal(got, want)


@pytest.mark.parametrize(("variant", "are_equal"), [("v1", True), ("v2", False)])
def test_v1_draws_the_same_components_for_both_factors_and_v2_for_each(
    directory, variant, are_equal
):
    run = bench(directory, RMLoRA(rank=6, num_drawn=2, variant=variant), Watching)
    for _ in range(4):
        run.step()
    same = []
    for _, after in run.method.seen[1:]:
        for path in run.attached.layers:
            rows, columns = (trained_components(f"{path}.{n}", after[f"{path}.{n}"]) for n in "ab")
            same.append(rows == columns)
    assert all(same) == are_equal
    assert sum(same) < 0.5 * len(same) or are_equal  # by chance one pair in fifteen


def test_every_layer_and_every_step_has_its_own_draw(directory):
    run = bench(directory, RMLoRA(rank=6, num_drawn=2), Watching)
    for _ in range(5):
        run.step()
    drawn = [
        [trained_components(name, g) for name, g in after.items() if name.endswith(".a")]
        for _, after in run.method.seen[1:]
    ]
    assert all(len(set(of_step)) > 1 for of_step in drawn)
    assert all(len(set(of_layer)) > 1 for of_layer in zip(*drawn, strict=True))


def test_components_are_drawn_with_equal_probability():
    draw = torch.Generator().manual_seed(0)
    kept = sum((~mask_all_but(2, 5, draw)).int() for _ in range(2000))
    assert kept.sum() == 2 * 2000
    # 2000 draws with probability 2/5: standard deviation 22
    assert (kept - 800).abs().max() < 4 * 22


def test_half_of_the_rank_of_a_layer_is_drawn_by_default(directory):
    run = bench(directory, RMLoRA(rank=4, ranks={"q_proj": 7, "k_proj": 1}), Watching)
    for _ in range(2):
        run.step()
    for name, gradient in run.method.seen[1][1].items():
        expected = 3 if "q_proj" in name else 1 if "k_proj" in name else 2
        assert len(trained_components(name, gradient)) == expected


def test_the_clipped_norm_is_that_of_the_masked_gradients(directory):
    run = bench(directory, RMLoRA(rank=6, num_drawn=2), Watching)
    for _ in range(2):
        run.step()
    before, after = (
        torch.cat([g.flatten() for g in gradients.values()]).norm().item()
        for gradients in run.method.seen[1]
    )
    assert run.result.grad_norm == pytest.approx(after, rel=1e-5)
    assert after < 0.9 * before


def test_only_the_factors_are_masked(directory):
    run = bench(directory, RMLoRA(rank=6, num_drawn=1, train_norms=True))
    for _ in range(3):
        before = {
            n: p.detach().clone() for n, p in run.attached.parameters().items() if "norm" in n
        }
        run.step()
    after = run.attached.parameters()
    assert before
    assert all((after[name] != value).all() for name, value in before.items())


# -- strict masks ----------------------------------------------------------------------------------


def masked_components_that_moved(run):
    """For every factor: whether components not drawn in the next step moved, in either copy."""
    parameters = run.attached.parameters()
    then = {n: (run.engine.read(p), p.detach().clone()) for n, p in parameters.items()}
    run.step()
    moved = []
    for name, gradient in run.method.seen[-1][1].items():
        masked = sorted(set(range(6)) - trained_components(name, gradient))
        now = run.engine.read(parameters[name]), parameters[name].detach()
        pairs = zip(then[name], now, strict=True)
        moved.append(
            any(
                not torch.equal(of_component(name, a, masked), of_component(name, b, masked))
                for a, b in pairs
            )
        )
        drawn = sorted(trained_components(name, gradient))
        assert not torch.equal(
            of_component(name, now[0], drawn), of_component(name, then[name][0], drawn)
        )
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strict_mask_keeps_masked_components_to_the_bit(directory, dtype):
    settings = RMLoRA(rank=6, num_drawn=2, strict_mask=True)
    run = bench(directory, settings, Watching, dtype=dtype, weight_decay=0.1)
    run.step()
    for _ in range(4):
        assert not any(masked_components_that_moved(run))


def test_without_a_strict_mask_momentum_moves_masked_components(directory):
    run = bench(directory, RMLoRA(rank=6, num_drawn=2), Watching)
    run.step()
    assert all(masked_components_that_moved(run))


def test_a_skipped_step_writes_nothing():
    layer = perturb(made(RMLoRA(rank=6, strict_mask=True)))

    class Reading:
        def read(self, parameter):
            return parameter.detach().clone()

        def gradient(self, parameter):
            return torch.ones_like(parameter)

        def set_gradient(self, parameter, value):
            pass

    draw = generator(0, "method", 1)
    layer.method.before_step(Reading(), StepInfo(1, 20, 1e-2, draw))
    assert layer.method.previous
    layer.method.after_step(Reading(), StepInfo(1, 20, 1e-2, draw, skipped=True))
    assert not layer.method.previous


def test_a_layer_without_a_gradient_is_ignored():
    layer = made(RMLoRA(rank=6))

    class Without:
        def gradient(self, parameter):
            return None

    layer.method.before_step(Without(), StepInfo(1, 20, 1e-2, generator(0, "method", 1)))


# -- LoRA, resuming, the claim of the paper --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_components_and_no_penalty_it_equals_lora_to_the_bit(directory, dtype):
    neutral = RMLoRA(rank=4, alpha=8, num_drawn=4, orthogonality=0.0, strict_mask=True)
    run = bench(directory, neutral, dtype=dtype)
    lora = bench(directory, LoRA(rank=4, alpha=8), LoRAMethod, dtype=dtype)
    assert [run.step() for _ in range(5)] == [lora.step() for _ in range(5)]
    found, expected = run.attached.state(), lora.attached.state()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("strict", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(directory, strict):
    settings = RMLoRA(rank=6, strict_mask=strict, dropout=0.1)
    how = {"dtype": torch.bfloat16, "weight_decay": 0.1}
    assert_resumes_exactly(partial(bench, directory, settings, **how))


def effective_rank_after_learning(method, settings, seed):
    """exp of the entropy of the normalised singular values of a delta learnt by regression."""
    draw = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(16, 8, generator=draw))
    v, _ = torch.linalg.qr(torch.randn(24, 8, generator=draw))
    target = u @ torch.diag(0.5 ** torch.arange(8.0)) @ v.T
    layer = one_layer(settings, 16, 24, method=method, seed=seed)
    optimizer = torch.optim.Adam(layer.trained().values(), lr=1e-2)
    for _ in range(300):
        x = torch.randn(64, 24, generator=draw)
        loss = F.mse_loss(layer.update(x), x @ target.T)
        penalty = layer.method.penalty()
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
    values = torch.linalg.svdvals(layer.delta())[:8]
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_penalty_raises_the_effective_rank_above_that_of_lora(seed):
    ours = effective_rank_after_learning(RMLoRAMethod, RMLoRA(rank=8, alpha=8), seed)
    theirs = effective_rank_after_learning(LoRAMethod, LoRA(rank=8, alpha=8), seed)
    assert ours > theirs + 0.1  # 0.21 to 0.27 more than 3.7


# -- settings --------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_released_glue_script():
    settings = RMLoRA()
    assert (settings.rank, settings.alpha, settings.variant) == (8, 32, "v2")
    assert (settings.orthogonality, settings.num_drawn, settings.strict_mask) == (0.1, None, False)


def test_drawing_more_components_than_the_rank_is_an_error():
    with pytest.raises(ValidationError, match="num_drawn=9 is above the rank, 8"):
        RMLoRA(rank=8, num_drawn=9)
    assert RMLoRA(rank=8, num_drawn=9, ranks={"q_proj": 16}).num_drawn == 9
