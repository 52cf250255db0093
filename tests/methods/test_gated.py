"""The gated layer of SoRA and AdaLoRA: one gate per component, components of gate zero left out."""

import pytest
import torch

from qlora_lite.adapters.layer import Factors
from qlora_lite.methods.adalora import AdaLoRA
from qlora_lite.methods.sora import SoRA
from qlora_lite.model.targets import LinearSpec
from tests.tiny import save_tiny
from tests.workbench import Bench, one_layer, perturb

GATED = [SoRA(rank=4, alpha=6), AdaLoRA(rank=4, target_rank=2, alpha=6)]

each = pytest.mark.parametrize("settings", GATED, ids=lambda s: s.kind)


@pytest.mark.parametrize(("settings", "name"), zip(GATED, "ge", strict=True))
def test_saved_adapters_name_the_gates_as_the_papers_do(settings, name):
    layer = one_layer(settings, 33, 57)
    shapes = {n: tuple(t.shape) for n, t in layer.state().items()}
    assert shapes == {"a": (4, 57), "b": (33, 4), name: (4,)}
    assert layer.gate is getattr(layer, name)


@each
def test_output_and_gradients_are_those_of_the_formula(settings):
    layer = perturb(one_layer(settings, 33, 57), size=0.3)
    x = torch.randn(5, 57)
    copies = [p.detach().clone().requires_grad_() for p in (layer.a, layer.b, layer.gate)]
    a, b, gate = copies
    delta = sum(6 / 4 * gate[i] * torch.outer(b[:, i], a[i]) for i in range(4))
    expected = x @ (layer.base.dense() + delta).T
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(5, 33)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), copies)
    gradients = torch.autograd.grad((found * weights).sum(), [layer.a, layer.b, layer.gate])
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@each
def test_components_with_a_zero_gate_are_not_exported(settings):
    layer = perturb(one_layer(settings, 33, 57), size=0.3)
    with torch.no_grad():
        layer.gate[[0, 2]] = 0.0
    pair = layer.factors()
    assert pair.rank == 2
    torch.testing.assert_close(pair.up @ pair.down, layer.delta(), rtol=1e-5, atol=1e-5)
    assert layer.factors(rank=1) is None
    assert layer.factors(rank=2).rank == 2


@each
def test_a_zero_gate_has_a_gradient_but_its_factors_do_not(settings):
    layer = perturb(one_layer(settings, 33, 57), size=0.3)
    with torch.no_grad():
        layer.gate[1] = 0.0
    loss = layer(torch.randn(5, 57)).square().sum()
    a, b, gate = torch.autograd.grad(loss, [layer.a, layer.b, layer.gate])
    assert not a[1].any()
    assert not b[:, 1].any()
    assert gate[1] != 0


@each
def test_a_warm_start_opens_the_gates_of_its_components(settings):
    layer = one_layer(settings, 33, 57)
    draw = torch.Generator().manual_seed(3)
    pair = Factors(torch.randn(2, 57, generator=draw), torch.randn(33, 2, generator=draw))
    start = layer.gate.detach().clone()
    with torch.no_grad():
        layer.b.zero_()
    layer.warm_start(pair)
    assert torch.equal(layer.gate.detach()[:2], torch.ones(2))
    assert torch.equal(layer.gate.detach()[2:], start[2:])
    torch.testing.assert_close(layer.delta(), pair.up @ pair.down, rtol=1e-4, atol=1e-4)


@each
def test_gates_are_stored_in_fp32_and_do_not_decay(tmp_path, settings):
    bench = Bench(save_tiny(tmp_path / "base"), settings, dtype=torch.bfloat16)
    layers = bench.attached.layers.values()
    assert {(layer.a.dtype, layer.gate.dtype) for layer in layers} == {
        (torch.bfloat16, torch.float32)
    }
    decays = {
        name.rpartition(".")[2]: g.decays for g in bench.attached.groups() for name in g.names
    }
    assert decays == {"a": True, "b": True, next(iter(layers)).gate_name: False}


@each
def test_the_memory_plan_counts_the_trained_tensors(settings):
    layer = one_layer(settings, 33, 57)
    footprint = layer.method.footprint(
        LinearSpec("blocks.0.linear", 57, 33, 0, 1, "other"), layer.plan
    )
    count = sum(p.numel() for p in layer.trained().values())
    assert footprint.trained == layer.trainable_count() == count
