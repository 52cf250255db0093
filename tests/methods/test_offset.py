"""Methods that start from a decomposition of the weight, in modes offset and requantise."""

import pytest
import torch

from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.offset import original
from qlora_lite.methods.olora import OLoRA
from qlora_lite.methods.pissa import PiSSA
from qlora_lite.model.quant import FP32, NF4
from qlora_lite.model.quantise import quantise
from tests.tiny import save_tiny
from tests.workbench import CPU, Bench, one_layer, perturb

SMALL = {"rank": 4, "alpha": 6}


def test_ranks_are_limited_to_the_full_rank_of_the_weight():
    layer = one_layer(PiSSA(rank=128, alpha=12), 33, 57)
    assert layer.a0.shape == (33, 57)
    assert layer.scale == pytest.approx(12 / 33)


@pytest.mark.parametrize("settings", [PiSSA(**SMALL), OLoRA(**SMALL, dropout=0.0)])
def test_both_modes_have_the_same_losses(tmp_path, settings):
    """On an fp32 base the subtraction is exact, so both modes train alike."""
    directory = save_tiny(tmp_path / "base")
    offset = Bench(directory, settings, FP32(), lr=1e-3)
    requantised = Bench(
        directory, settings.model_copy(update={"mode": "requantise"}), FP32(), lr=1e-3
    )
    for path, layer in offset.attached.layers.items():  # requantise rounds the start to bf16
        other = requantised.attached.layers[path]
        layer.a0.copy_(other.a.detach())
        layer.b0.copy_(other.b.detach())
    for _ in range(8):
        assert offset.step() == pytest.approx(requantised.step(), rel=1e-5)


def test_requantise_quantises_the_residual(tmp_path):
    layer = one_layer(PiSSA(**SMALL, mode="requantise"), 33, 57)
    assert torch.equal(layer.a.bfloat16().float(), layer.a)
    residual = original(layer.base) - layer.scale * (layer.b @ layer.a).detach()
    assert torch.equal(layer.base.dense(), quantise(residual, NF4(), CPU).dense())
    error = (layer.base.dense() - residual).norm() / residual.norm()
    assert error < 0.11
    perturb(layer)
    assert layer.start.keys() == {"a0", "b0"}


def test_a_disabled_requantised_adapter_is_not_the_base(tmp_path):
    directory = save_tiny(tmp_path / "base")
    requantised = Bench(directory, PiSSA(**SMALL, mode="requantise"))
    offset = Bench(directory, PiSSA(**SMALL))
    assert offset.attached.is_base_unchanged
    assert not requantised.attached.is_base_unchanged
    with requantised.attached.disabled():
        assert not torch.allclose(requantised.logits(), offset.logits(), atol=0.1)


def test_a_saved_start_is_loaded_to_the_bit_and_not_recomputed(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path / "base")
    for settings in (PiSSA(**SMALL, mode="requantise"), PiSSA(**SMALL)):
        first = Bench(directory, settings)
        first.step()
        saved = {name: t.clone() for name, t in first.attached.state().items()}
        with monkeypatch.context() as patch:
            patch.setattr("qlora_lite.methods.pissa.principal_factors", None)
            second = Bench(directory, settings, saved=saved)
        assert torch.equal(second.logits(), first.logits())


def test_a_warm_start_from_a_lora_is_an_error():
    layer = one_layer(PiSSA(**SMALL), 33, 57)
    pair = one_layer(PiSSA(**SMALL), 33, 57).factors()
    with pytest.raises(AdapterError, match="cannot start from a plain LoRA"):
        layer.warm_start(pair)
