"""AdaLoRA: exact budgets, importance scores and which triplets are kept."""

import pytest
import torch
from pydantic import ValidationError

from qlora_lite.adapters.method import StepInfo
from qlora_lite.methods.adalora import AdaLoRA, AdaLoRAMethod, budget
from tests.methods.access import PlainAccess
from tests.tiny import save_tiny
from tests.workbench import Bench, one_layer, perturb

TOTAL = 20
SETTINGS = AdaLoRA(rank=6, target_rank=3, alpha=8, warmup=3, final=5, every=2, orthogonality=0.5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def kept(bench):
    return {p: layer.e.detach() != 0 for p, layer in bench.attached.layers.items()}


def num_kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


def test_the_budget_is_the_cubic_curve_of_the_paper():
    curve = [budget(done, 50, 900, 864, 576) for done in range(1001)]
    assert curve[:51] == [864] * 51
    assert curve[51] == 862
    assert curve[900:] == [576] * 101
    assert curve == sorted(curve, reverse=True)
    halfway = 576 + (864 - 576) * (1 - (475 - 50) / 850) ** 3
    assert curve[475] == int(halfway)


def test_the_budget_is_met_exactly_and_final_triplets_stay(directory):
    bench = Bench(directory, SETTINGS, total=TOTAL)
    num_layers = len(bench.attached.layers)
    patterns = []
    for done in range(1, TOTAL + 1):
        bench.step()
        patterns.append(kept(bench))
        if done <= 3:
            assert num_kept(patterns[-1]) == 6 * num_layers
        elif done < 15 and done % 2 == 0:
            expected = budget(done, 3, 15, 6 * num_layers, 3 * num_layers)
            assert num_kept(patterns[-1]) == expected
        elif done >= 15:
            assert num_kept(patterns[-1]) == 3 * num_layers
    final = patterns[14]
    assert all(torch.equal(p[path], mask) for p in patterns[14:] for path, mask in final.items())
    widths = {int(mask.sum()) for mask in final.values()}
    assert len(widths) > 1  # layers ended with different ranks
    assert bench.method._sensitivity == {}


def test_a_cut_triplet_can_return_before_the_budget_is_final(directory):
    bench = Bench(directory, SETTINGS, total=TOTAL)
    cut, revived = {}, False
    for _ in range(14):
        bench.step()
        now = kept(bench)
        revived |= any((now[path] & ~mask).any() for path, mask in cut.items())
        cut = now
    assert revived


def test_the_scores_are_those_of_the_formula(directory):
    seen = []

    class Watching(AdaLoRAMethod):
        def after_step(self, access, step):
            gradients = {key: g.clone() for key, g in self._gradients.items()}
            values = {
                f"{path}.{name}": access.read(p)
                for path, layer in self.layers.items()
                for name, p in layer.trained().items()
            }
            seen.append((values, gradients))
            super().after_step(access, step)

    bench = Bench(directory, SETTINGS, total=TOTAL, method=Watching)
    for _ in range(3):
        bench.step()
    path = next(iter(bench.attached.layers))
    scores = {}
    for name in ("a", "b", "e"):
        mean = deviation = 0.0
        for values, gradients in seen:
            sensitivity = (values[f"{path}.{name}"] * gradients[f"{path}.{name}"]).abs()
            mean = 0.85 * mean + 0.15 * sensitivity
            deviation = 0.85 * deviation + 0.15 * (sensitivity - mean).abs()
        scores[name] = mean * deviation
    d_in, d_out = scores["a"].shape[1], scores["b"].shape[0]
    for i, found in enumerate(bench.method._scores(path)):
        expected = scores["e"][i] + scores["a"][i].sum() / d_in + scores["b"][:, i].sum() / d_out
        assert found == pytest.approx(expected.item(), rel=1e-4)


def test_a_layer_without_tokens_has_importance_zero():
    layer = one_layer(SETTINGS, 33, 57)
    access, step = PlainAccess(), StepInfo(0, TOTAL, 1e-2, torch.Generator())
    layer.a.grad = torch.ones_like(layer.a)  # of the penalty; e and b have none
    layer.method.before_step(access, step)
    layer.method.after_step(access, step)
    expected = (0.15 * 0.15 * 0.85 * layer.a.detach().square()).mean(1)
    torch.testing.assert_close(layer.method._scores("blocks.0.linear"), expected)


def test_ties_keep_exactly_as_many_as_the_budget():
    layer = one_layer(SETTINGS, 33, 57)
    method = layer.method
    for name, parameter in layer.trained().items():
        method._sensitivity[f"blocks.0.linear.{name}"] = torch.ones_like(parameter)
        method._deviation[f"blocks.0.linear.{name}"] = torch.ones_like(parameter)
    for wanted in range(7):
        assert int(method._select(wanted)["blocks.0.linear"].sum()) == wanted


def test_the_target_may_be_the_first_rank(directory):
    settings = SETTINGS.model_copy(update={"target_rank": 6})
    bench = Bench(directory, settings, total=TOTAL)
    for _ in range(TOTAL):
        bench.step()
    assert num_kept(kept(bench)) == 6 * len(bench.attached.layers)


def test_a_growing_budget_is_an_error():
    with pytest.raises(ValidationError, match=r"target_rank=8.*rank=4.*target_rank=4 or less"):
        AdaLoRA(rank=4, target_rank=8)


def test_output_and_penalty_are_those_of_the_formula():
    layer = perturb(one_layer(SETTINGS, 33, 57), size=0.3)
    x = torch.randn(5, 57)
    p, e, q = layer.b.detach(), layer.e.detach(), layer.a.detach()
    weight = layer.base.dense() + 8 / (6 + 1e-5) * p @ torch.diag(e) @ q
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    identity = torch.eye(6)
    expected = 0.5 * ((q @ q.T - identity).norm() + (p.T @ p - identity).norm()) / 2
    assert layer.method.penalty().item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_highest_scores_are_kept_whatever_is_masked(directory):
    bench = Bench(directory, SETTINGS, total=TOTAL)
    for _ in range(4):
        bench.step()
    scores = {path: bench.method._scores(path) for path in bench.attached.layers}
    best = sorted((s.item() for found in scores.values() for s in found), reverse=True)
    kept_by_score = {path: found >= best[19] for path, found in scores.items()}
    selected = bench.method._select(20)
    assert all(torch.equal(selected[path], mask) for path, mask in kept_by_score.items())
    bench.method._mask(bench.engine, selected)
    assert all(torch.equal(bench.method._scores(path), found) for path, found in scores.items())


def test_a_run_resumed_after_the_final_budget_keeps_its_triplets(directory):
    first = Bench(directory, SETTINGS, total=TOTAL)
    for _ in range(16):
        first.step()
    saved = {name: tensor.clone() for name, tensor in first.attached.state().items()}
    second = Bench(directory, SETTINGS, total=TOTAL, saved=saved)
    second.method.load_state_dict(first.method.state_dict())
    second.number = 16
    before = kept(first)
    for _ in range(TOTAL - 16):
        second.step()
    assert all(torch.equal(mask, before[path]) for path, mask in kept(second).items())


def test_extending_a_run_reopens_its_budget(directory):
    bench = Bench(directory, SETTINGS, total=10)
    for _ in range(10):
        bench.step()
    first = kept(bench)
    bench.total = 40
    counts = []
    for _ in range(30):
        bench.step()
        counts.append(num_kept(kept(bench)))
    assert counts[0] > 3 * len(first)
    assert counts[-1] == 3 * len(first)
    assert any(not torch.equal(mask, first[path]) for path, mask in kept(bench).items())
    assert bench.method._sensitivity == {}


@pytest.mark.parametrize("phases", [{"warmup": 6, "final": 6}, {"warmup": 20}, {"final": 8}])
def test_the_final_budget_is_met_in_a_run_shorter_than_its_phases(directory, phases):
    bench = Bench(directory, SETTINGS.model_copy(update=phases), total=8)
    for _ in range(8):
        bench.step()
    assert num_kept(kept(bench)) == 3 * len(bench.attached.layers)
