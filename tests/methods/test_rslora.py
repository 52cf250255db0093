"""rsLoRA: the size of the update does not depend on the rank."""

import peft
import pytest
import torch

from qlora_lite.methods.lora import LoRA
from qlora_lite.methods.rslora import RsLoRA
from qlora_lite.model.quant import FP32
from tests.workbench import one_layer


def layer_of(settings):
    return one_layer(settings, 1024, 512, FP32())


@pytest.mark.parametrize(("rank", "alpha"), [(16, 8), (5, 32)])
def test_the_scale_is_that_of_peft(rank, alpha):
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=True, target_modules=["0"])
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024))
    twin = peft.get_peft_model(model, config).base_model.model[0]
    scale = twin.scaling["default"]
    assert layer_of(RsLoRA(rank=rank, alpha=alpha)).scale == pytest.approx(scale)
    by_hand = LoRA(rank=rank, alpha=alpha, scaling="alpha/sqrt(r)")
    assert layer_of(by_hand).scale == pytest.approx(scale)


def size_of_update(settings):
    """Root mean square of the update for factors of independent entries."""
    draw = torch.Generator().manual_seed(0)
    layer = layer_of(settings)
    with torch.no_grad():
        layer.b.normal_(generator=draw)
        return layer.update(torch.randn(400, 512, generator=draw)).square().mean().sqrt().item()


def test_the_update_keeps_its_size_when_the_rank_grows_and_that_of_lora_shrinks():
    """What the paper calls rank-stabilised, in forward. LoRA falls as 1 / sqrt(rank)."""
    low, high = 4, 256
    ours = size_of_update(RsLoRA(rank=high)) / size_of_update(RsLoRA(rank=low))
    lora = size_of_update(LoRA(rank=high)) / size_of_update(LoRA(rank=low))
    assert ours == pytest.approx(1, rel=0.1)
    assert lora == pytest.approx((low / high) ** 0.5, rel=0.1)
