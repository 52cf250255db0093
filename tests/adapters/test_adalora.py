"""AdaLoRA: budgets that are met exactly, and triplets kept where they matter most."""

import pytest
import torch
from pydantic import ValidationError

from qlora_lite.adapters.adalora import AdaLoRA, AdaLoRAMethod, budget
from tests.tiny import save_tiny
from tests.workbench import Bench, one_layer, stir

TOTAL = 20
SETTINGS = AdaLoRA(rank=6, target_rank=3, alpha=8, warmup=3, final=5, every=2, orthogonality=0.5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def kept(bench):
    return {p: layer.e.detach() != 0 for p, layer in bench.attached.layers.items()}


def count(masks):
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
            assert count(patterns[-1]) == 6 * num_layers
        elif done < 15 and done % 2 == 0:
            expected = budget(done, 3, 15, 6 * num_layers, 3 * num_layers)
            assert count(patterns[-1]) == expected
        elif done >= 15:
            assert count(patterns[-1]) == 3 * num_layers
    final = patterns[14]
    assert all(torch.equal(p[path], mask) for p in patterns[14:] for path, mask in final.items())
    widths = {int(mask.sum()) for mask in final.values()}
    assert len(widths) > 1  # rank really moved between layers
    assert bench.method._sensitivity == {}


def test_a_triplet_that_was_cut_may_come_back_before_the_budget_is_final(directory):
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
    assert count(kept(bench)) == 6 * len(bench.attached.layers)


def test_a_budget_that_grows_is_refused():
    with pytest.raises(ValidationError, match="The budget can only shrink"):
        AdaLoRA(rank=4, target_rank=8)


def test_output_and_penalty_are_those_of_the_formula():
    layer = stir(one_layer(SETTINGS, 33, 57), size=0.3)
    x = torch.randn(5, 57)
    p, e, q = layer.b.detach(), layer.e.detach(), layer.a.detach()
    weight = layer.base.dense() + 8 / (6 + 1e-5) * p @ torch.diag(e) @ q
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    identity = torch.eye(6)
    expected = 0.5 * ((q @ q.T - identity).norm() + (p.T @ p - identity).norm()) / 2
    assert layer.method.penalty().item() == pytest.approx(expected.item(), rel=1e-5)
