"""OLoRA: the start is a QR decomposition of the weight."""

import peft
import pytest
import torch

from qlora_lite.methods.olora import OLoRA, orthonormal_factors
from qlora_lite.model.quant import FP32
from tests.workbench import CLOSE, one_layer

SETTINGS = OLoRA(rank=4, alpha=6)


def start_of(layer):
    """s B0 A0 of a layer in offset mode."""
    return layer.scale * (layer.b0 @ layer.a0)


@pytest.mark.parametrize("shape", [(33, 57), (57, 33)])
def test_the_start_is_orthonormal_and_trapezoidal(shape):
    layer = one_layer(SETTINGS, *shape, FP32())
    torch.testing.assert_close(layer.b0.T @ layer.b0, torch.eye(4), **CLOSE)
    assert not layer.a0.tril(-1).any()
    assert (layer.a0.diagonal() >= 0).all()
    first_columns = layer.base.dense()[:, :4]
    torch.testing.assert_close(layer.b0 @ layer.a0[:, :4], first_columns, **CLOSE)
    assert torch.linalg.matrix_rank(start_of(layer)) == 4


def test_the_start_is_that_of_peft():
    layer = one_layer(SETTINGS, 33, 57, FP32())
    model = torch.nn.Sequential(torch.nn.Linear(57, 33, bias=False))
    model[0].weight.data.copy_(layer.base.dense())
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="olora", target_modules=["0"])
    twin = peft.get_peft_model(model, config).base_model.model[0]
    torch.testing.assert_close(start_of(layer), twin.get_delta_weight("default"), **CLOSE)


def test_the_signs_do_not_depend_on_the_lapack_build(monkeypatch):
    """Q S and S R are as good a decomposition for every diagonal S of signs."""
    weight = torch.randn(33, 57, generator=torch.Generator().manual_seed(0))
    expected = orthonormal_factors(weight, 4)
    q, r = torch.linalg.qr(weight)
    signs = torch.where(torch.arange(33) % 2 == 0, -1.0, 1.0)
    monkeypatch.setattr(torch.linalg, "qr", lambda _: (q * signs, signs[:, None] * r))
    for found, factor in zip(orthonormal_factors(weight, 4), expected, strict=True):
        assert torch.equal(found, factor)
