"""PiSSA: the start is the best low-rank approximation of the weight."""

import peft
import pytest
import torch

from qlora_lite.methods.pissa import PiSSA, principal_factors
from qlora_lite.model.quant import FP32, NF4
from qlora_lite.model.quantise import quantise
from tests.workbench import CLOSE, CPU, one_layer

SMALL = {"rank": 4, "alpha": 6}


def start_of(layer):
    """s B0 A0 of a layer in offset mode."""
    return layer.scale * (layer.b0 @ layer.a0)


def test_the_start_is_the_best_low_rank_approximation_with_balanced_factors():
    layer = one_layer(PiSSA(**SMALL), 33, 57, FP32())
    u, s, vh = torch.linalg.svd(layer.base.dense())
    best = u[:, :4] * s[:4] @ vh[:4]
    torch.testing.assert_close(start_of(layer), best, **CLOSE)
    expected = torch.diag(s[:4] / layer.scale)
    torch.testing.assert_close(layer.b0.T @ layer.b0, expected, **CLOSE)
    torch.testing.assert_close(layer.a0 @ layer.a0.T, expected, **CLOSE)


@pytest.mark.parametrize("alpha", [4, 6])
def test_the_start_is_that_of_peft(alpha):
    layer = one_layer(PiSSA(rank=4, alpha=alpha), 33, 57, FP32())
    model = torch.nn.Sequential(torch.nn.Linear(57, 33, bias=False))
    model[0].weight.data.copy_(layer.base.dense())
    config = peft.LoraConfig(r=4, lora_alpha=alpha, init_lora_weights="pissa", target_modules=["0"])
    twin = peft.get_peft_model(model, config).base_model.model[0]
    torch.testing.assert_close(start_of(layer), twin.get_delta_weight("default"), **CLOSE)


def test_a_randomised_svd_is_close_and_does_not_use_the_global_random_stream():
    draw = torch.Generator().manual_seed(0)
    low_rank = torch.randn(60, 4, generator=draw) @ torch.randn(4, 80, generator=draw)
    weight = low_rank + 0.01 * torch.randn(60, 80, generator=draw)
    exact = principal_factors(weight, 4, 2.0, None, draw)
    before = torch.random.get_rng_state()
    first = principal_factors(weight, 4, 2.0, 8, torch.Generator().manual_seed(1))
    second = principal_factors(weight, 4, 2.0, 8, torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1] @ first[0], exact[1] @ exact[0], rtol=1e-3, atol=1e-3)


def test_the_residual_of_a_weight_with_large_singular_values_has_a_smaller_quantisation_error():
    draw = torch.Generator().manual_seed(0)
    low_rank = torch.randn(64, 2, generator=draw) @ torch.randn(2, 128, generator=draw)
    weight = torch.randn(64, 128, generator=draw) + 4 * low_rank
    error = (quantise(weight, NF4(), CPU).dense() - weight).norm()
    a, b = principal_factors(weight, 2, 1.0, None, draw)
    residual = weight - b @ a
    assert (quantise(residual, NF4(), CPU).dense() - residual).norm() < error
