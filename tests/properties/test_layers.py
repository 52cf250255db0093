"""Properties of one layer of every method, on every base precision and shape.

By default every method runs on NF4 and one odd shape; the rest of the grid are slow tests.
"""

import pytest
import torch
from torch.nn import functional as F

from qlora_lite.adapters.layer import AdapterLayer
from qlora_lite.methods.dylora import DyLoRALayer
from qlora_lite.methods.loftq import LoftQ
from qlora_lite.methods.offset import original
from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8
from qlora_lite.model.targets import LinearSpec
from tests.properties.cases import CASES, SAME_LAYER
from tests.workbench import one_layer, perturb

FP32_SUMS = {"rtol": 1e-5, "atol": 1e-5}
"""fp32 sums of up to 130 numbers of size 1, in another order."""

QUANTS = {"nf4": NF4(), "fp4": FP4(), "int8": Int8(), "bf16": BF16(), "fp32": FP32()}
SHAPES = {"square": (66, 66), "wide": (42, 129), "tall": (129, 42), "odd": (33, 57)}
UNQUANTISED = ("bf16", "fp32")


def grid(repeated=()):
    """The whole grid. What is `repeated` is among the slow tests only."""
    for name, case in CASES.items():
        for quant in QUANTS:
            for shape in SHAPES:
                if isinstance(case.settings, LoftQ) and quant in UNQUANTISED:
                    continue  # refused: there is no error to start from (see test_loftq.py)
                quick = (quant, shape) == ("nf4", "odd") and name not in repeated
                marks = () if quick else (pytest.mark.slow,)
                yield pytest.param(name, quant, shape, id=f"{name}-{quant}-{shape}", marks=marks)


every = pytest.mark.parametrize(("name", "quant", "shape"), list(grid()))
every_layer = pytest.mark.parametrize(("name", "quant", "shape"), list(grid(SAME_LAYER)))


def made(name: str, quant: str, shape: str, dtype: torch.dtype = torch.float32) -> AdapterLayer:
    d_out, d_in = SHAPES[shape]
    layer = one_layer(CASES[name].settings, d_out, d_in, QUANTS[quant], dtype=dtype)
    return layer.eval()


def inputs(layer: AdapterLayer) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    return torch.randn(3, 5, layer.base.d_in, generator=draw)


@every
def test_before_training_the_output_is_that_of_the_base(name, quant, shape):
    layer = made(name, quant, shape)
    x = inputs(layer)
    expected, found = layer.base(x), layer(x)
    match CASES[name].start:
        case "base":
            assert torch.equal(found, expected)
        case "near base":
            torch.testing.assert_close(found, expected, **FP32_SUMS)
        case "changed base":
            weight = original(layer.base)
            plain = one_layer(CASES["lora"].settings, *SHAPES[shape], QUANTS[quant]).base.dense()
            error = (layer.merged(layer.base.dense()) - weight).norm()
            # not farther from the weight than its plain quantisation
            assert error <= 1.1 * (plain - weight).norm() + 1e-3 * weight.norm()


@every
def test_before_training_in_bf16_the_output_is_that_of_the_base(name, quant, shape):
    layer = made(name, quant, shape, torch.bfloat16)
    x = inputs(layer)
    if CASES[name].start == "base":
        assert torch.equal(layer(x), layer.base(x))
    elif CASES[name].start == "near base":
        torch.testing.assert_close(layer(x), layer.base(x), **FP32_SUMS)


@every_layer
def test_output_and_input_gradient_are_those_of_the_merged_weight(name, quant, shape):
    layer = perturb(made(name, quant, shape))
    x = inputs(layer).requires_grad_()
    weight = layer.merged(layer.base.dense())
    expected = F.linear(x, weight)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    found = layer(x)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    assert not torch.allclose(found, layer.base(x), **FP32_SUMS)
    torch.testing.assert_close(found, expected, **FP32_SUMS)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-4)


@every_layer
def test_parameter_gradients_are_those_of_the_delta(name, quant, shape):
    """For methods with a pair: the gradient of <G, x delta^T>, by plain autograd."""
    layer = perturb(made(name, quant, shape))
    if layer.live_factors() is None:
        return  # DoRA's norm is constant in backward, MoRA has no pair: see their own tests
    x = inputs(layer)
    weights = torch.randn(
        *x.shape[:-1], layer.base.d_out, generator=torch.Generator().manual_seed(2)
    )
    parameters = list(layer.trained().values())
    found = torch.autograd.grad((layer(x) * weights).sum(), parameters)
    down, up = layer.live_factors()
    dense = layer.base.dense()
    expected = torch.autograd.grad((x @ (dense + up @ down).T * weights).sum(), parameters)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


@every_layer
def test_dropout_applies_in_training_and_only_to_the_adapter(name, quant, shape):
    layer = one_layer(
        CASES[name].settings.model_copy(update={"dropout": 0.5}), *SHAPES[shape], QUANTS[quant]
    )
    x = inputs(layer)
    torch.manual_seed(0)
    if CASES[name].start != "changed base":
        torch.testing.assert_close(layer.train()(x), layer.base(x), **FP32_SUMS)
    perturb(layer)
    first, second = layer(x), layer(x)
    assert not torch.allclose(first, second, **FP32_SUMS)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@every_layer
def test_without_dropout_training_and_evaluation_agree(name, quant, shape):
    layer = perturb(made(name, quant, shape))
    if isinstance(layer, DyLoRALayer):
        layer.drawn = layer.eval_rank
    x = inputs(layer)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), **FP32_SUMS)


@every_layer
def test_the_exported_pair_equals_the_delta(name, quant, shape):
    layer = perturb(made(name, quant, shape))
    pair = layer.factors()
    if pair is None:
        assert not CASES[name].peft
        return
    assert pair.relative_error == 0
    assert pair.down.shape == (pair.rank, layer.base.d_in)
    for rank in range(1, pair.rank + 2):
        cut = layer.factors(rank)
        assert cut is None or cut.rank <= rank
    if pair.magnitude is None:
        error = (pair.up @ pair.down - layer.delta()).norm() / layer.delta().norm()
        assert error <= 1e-5
    live = layer.live_factors()
    if live is not None:
        torch.testing.assert_close(live[1] @ live[0], layer.delta(), **FP32_SUMS)


@every
def test_the_number_of_trained_parameters_is_that_of_the_formula(name, quant, shape):
    layer = made(name, quant, shape)
    trained = layer.trained()
    count = sum(p.numel() for p in trained.values())
    assert layer.trainable_count() == count
    assert layer.method.footprint(_spec(layer), layer.plan).trained == count
    needing = {id(p) for p in layer.parameters() if p.requires_grad}
    assert needing == {id(p) for p in trained.values()}


@every_layer
def test_disabled_it_is_the_base(name, quant, shape):
    layer = perturb(made(name, quant, shape))
    x = inputs(layer)
    expected = layer.base(x)
    layer.enabled = False
    assert torch.equal(layer(x), expected)


@every
def test_its_state_is_restored_bit_for_bit(name, quant, shape):
    layer = perturb(made(name, quant, shape))
    other = made(name, quant, shape)
    saved = {key: value.clone() for key, value in layer.state().items()}
    assert other.state().keys() == saved.keys()
    other.load_state(saved)
    assert all(torch.equal(value, saved[key]) for key, value in other.state().items())
    x = inputs(layer)
    assert torch.equal(other(x), layer(x))


def _spec(layer):
    return LinearSpec("blocks.0.linear", layer.base.d_in, layer.base.d_out, 0, 1, "other")
