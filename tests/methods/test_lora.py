"""LoRA: start, forward, gradients, merge, count."""

import pytest
import torch
from torch.nn import functional as F

from qlora_lite.foundation import device
from qlora_lite.foundation.seeds import generator
from qlora_lite.methods.lora import LoRA, LoRAMethod
from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8
from qlora_lite.model.quantise import quantise
from qlora_lite.model.targets import LinearSpec

QUANTS = [NF4(), NF4(double_quant=False), FP4(), Int8(), BF16(), FP32()]


def build(settings=None, d_in=48, d_out=32, quant=None, bias=True):
    torch.manual_seed(0)
    rule = device.choose("cpu")
    base = quantise(
        torch.randn(d_out, d_in) / 7,
        quant or NF4(),
        rule,
        bias=torch.randn(d_out) if bias else None,
    )
    method = LoRAMethod(settings or LoRA(rank=4, alpha=8))
    spec = LinearSpec("block.0.q_proj", d_in, d_out, 0, 1, "attention")
    plan = method.plan([spec])[spec.path]
    return method.build(base, spec, plan, None, generator(0, spec.path)).train(False)


def randomise(layer):
    with torch.no_grad():
        layer.b.normal_()
    return layer


@pytest.mark.parametrize("quant", QUANTS, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), [(48, 32), (33, 65), (64, 1)])
def test_the_first_output_equals_the_base_bit_for_bit(quant, d_in, d_out):
    layer = build(quant=quant, d_in=d_in, d_out=d_out)
    x = torch.randn(3, 5, d_in)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("quant", QUANTS, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), [(48, 32), (33, 65)])
def test_forward_equals_the_formula_and_the_merged_layer(quant, d_in, d_out):
    layer = randomise(build(quant=quant, d_in=d_in, d_out=d_out))
    x = torch.randn(3, 5, d_in)
    dense = layer.base.dense()
    naive = x @ (dense + 8 / 4 * layer.b @ layer.a).T + layer.base.bias
    torch.testing.assert_close(layer(x), naive, rtol=1e-5, atol=1e-5)
    merged = F.linear(x, layer.merged(dense), layer.base.bias)
    torch.testing.assert_close(layer(x), merged, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_formula():
    layer = randomise(build())
    x = torch.randn(7, 48, requires_grad=True)
    weight = torch.randn(7, 32)
    dense, a, b = layer.base.dense(), layer.a, layer.b
    naive = ((x @ dense.T + 2.0 * x @ a.T @ b.T + layer.base.bias) * weight).sum()
    expected = torch.autograd.grad(naive, [x, a, b])
    ours = torch.autograd.grad((layer(x) * weight).sum(), [x, a, b])
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_first_sgd_step_changes_b_only():
    layer = build()
    before = layer.a.detach().clone()
    layer(torch.randn(9, 48)).square().sum().backward()
    assert not layer.a.grad.any()
    assert layer.b.grad.any()
    torch.optim.SGD(layer.trained().values(), lr=0.1).step()
    assert torch.equal(layer.a, before)
    assert layer.b.any()


def test_a_starts_uniform_within_one_over_the_root_of_d_in():
    layer = build(d_in=400)
    assert layer.a.abs().max() <= 400**-0.5
    assert layer.a.std().item() == pytest.approx((1 / (3 * 400)) ** 0.5, rel=0.1)


def test_factors_are_lossless_and_have_the_rank_of_the_layer():
    layer = randomise(build())
    pair = layer.factors()
    torch.testing.assert_close(pair.up @ pair.down, layer.delta())
    assert pair.relative_error == 0
    assert torch.linalg.matrix_rank(layer.delta()) == 4
    assert layer.factors(rank=2) is None


def test_the_count_matches_the_tensors_and_the_base_is_frozen():
    layer = build(d_in=33, d_out=65)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert layer.trainable_count() == sum(p.numel() for p in trained) == 4 * (33 + 65)
    layer(torch.randn(2, 33)).sum().backward()
    assert layer.base.weight.grad is None


def test_dropout_applies_to_the_input_of_the_adapter_only():
    layer = randomise(build(LoRA(rank=4, alpha=8, dropout=0.5)))
    x = torch.randn(4, 48)
    expected = layer(x)
    layer.train()
    torch.manual_seed(0)
    dropped = layer(x)
    assert not torch.equal(expected, dropped)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base(x))


def test_a_warm_start_from_a_smaller_rank_gives_the_same_delta():
    small = randomise(build(LoRA(rank=2, alpha=3)))
    large = build(LoRA(rank=4, alpha=8))
    large.warm_start(small.factors())
    torch.testing.assert_close(large.delta(), small.delta())
