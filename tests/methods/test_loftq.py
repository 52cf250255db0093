"""LoftQ: quantised weight and factors are chosen together."""

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition

from qlora_lite.adapters.plan import plan_layers
from qlora_lite.adapters.split_state import SplitState
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.loftq import LoftQ, LoftQMethod
from qlora_lite.methods.offset import original
from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8
from qlora_lite.model.quantise import quantise
from qlora_lite.model.targets import LinearSpec
from tests.tiny import save_tiny
from tests.workbench import CPU, Bench, one_layer

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def error_of(layer):
    return (layer.merged(layer.base.dense()) - original(layer.base)).norm()


def plain_error(layer):
    weight = original(layer.base)
    return (quantise(weight, layer.base.quant, CPU).dense() - weight).norm()


@pytest.mark.parametrize("quant", [NF4(), FP4(), NF4(double_quant=False), Int8()])
@pytest.mark.parametrize("shape", [(33, 57), (57, 33)])
def test_one_iteration_is_always_closer_to_the_weight(quant, shape):
    layer = one_layer(LoftQ(rank=4, alpha=3, iterations=1), *shape, quant)
    assert error_of(layer) < plain_error(layer)
    assert torch.equal(layer.base.dense(), quantise(original(layer.base), quant, CPU).dense())


def test_more_iterations_are_closer_still():
    errors = []
    for iterations in (1, 2, 4):
        layer = one_layer(LoftQ(rank=16, alpha=16, iterations=iterations), 128, 128)
        errors.append((error_of(layer) / plain_error(layer)).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.95


def test_the_start_is_that_of_algorithm_1():
    layer = one_layer(LoftQ(rank=4, alpha=6, iterations=3), 33, 57)
    weight = original(layer.base)
    low_rank = torch.zeros_like(weight)
    for _ in range(3):
        quantised = quantise(weight - low_rank, NF4(), CPU).dense()
        u, s, vh = torch.linalg.svd(weight - quantised, full_matrices=False)
        low_rank = (u[:, :4] * s[:4]) @ vh[:4]
    assert torch.equal(layer.base.dense(), quantised)
    torch.testing.assert_close(layer.delta(), low_rank, **CLOSE)


def test_the_start_is_that_of_peft_if_alpha_equals_the_rank():
    layer = one_layer(LoftQ(rank=4, alpha=4, iterations=1), 33, 57)
    found = _low_rank_decomposition(original(layer.base) - layer.base.dense(), reduced_rank=4)
    torch.testing.assert_close(layer.delta(), found["L"] @ found["R"], **CLOSE)


def test_the_scale_is_divided_out():
    deltas = [
        one_layer(LoftQ(rank=4, alpha=alpha, iterations=1), 33, 57).delta() for alpha in (1, 32)
    ]
    torch.testing.assert_close(*deltas, **CLOSE)


@pytest.mark.parametrize("quant", [BF16(), FP32()])
def test_a_base_without_quantisation_error_is_an_error(quant):
    with pytest.raises(AdapterError, match=r"blocks\.0\.linear.*base\.quant=nf4"):
        one_layer(LoftQ(rank=4), 33, 57, quant)


def test_the_model_starts_closer_to_the_unquantised_model(tmp_path):
    directory = save_tiny(tmp_path / "base")
    settings = LoftQ(rank=16, alpha=16)
    unquantised = Bench(directory, LoftQ(rank=16, iterations=1), Int8(), method=_PlainQuantisation)
    quantised = Bench(directory, LoftQ(rank=16), NF4(), method=_PlainQuantisation)
    ours = Bench(directory, settings, NF4())
    distance = (quantised.logits() - unquantised.logits()).norm()
    assert (ours.logits() - unquantised.logits()).norm() < distance


class _PlainQuantisation(LoftQMethod):
    """The plain quantised base, with factors of zero."""

    def split(self, spec, plan, dense, round_trip, generator, saved=None):
        a, b = dense.new_zeros(1, spec.d_in), dense.new_zeros(spec.d_out, 1)
        return dense, {"a": a, "b": b, "taken_a": a, "taken_b": b}


def test_a_saved_start_gives_the_same_quantised_weight():
    settings = LoftQ(rank=4, alpha=6, iterations=3)
    layer = one_layer(settings, 33, 57)
    saved = {f"blocks.0.linear.{name}": tensor for name, tensor in layer.state().items()}
    spec = LinearSpec("blocks.0.linear", 57, 33, 0, 1, "other")
    starts = SplitState(layer.method, plan_layers(layer.method, [spec]), 0, saved)
    layer.method._alternate = None  # recomputing the start would fail
    again = quantise(original(layer.base), NF4(), CPU, split=starts.split(spec.path))
    assert torch.equal(again.weight, layer.base.weight)
    assert torch.equal(again.scales, layer.base.scales)


def test_a_randomised_svd_is_close_to_the_exact_one():
    exact, randomised = (
        one_layer(LoftQ(rank=8, alpha=8, iterations=1, svd_iterations=n), 96, 80) for n in (None, 8)
    )
    assert not torch.equal(exact.delta(), randomised.delta())
    assert error_of(randomised) < 1.01 * error_of(exact)
