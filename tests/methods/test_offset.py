"""Methods that start inside the weight: PiSSA and OLoRA, beside it or taken out of it."""

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


def test_a_rank_above_the_weights_is_cut_to_it():
    layer = one_layer(PiSSA(rank=128, alpha=12), 33, 57)
    assert layer.a0.shape == (33, 57)
    assert layer.scale == pytest.approx(12 / 33)


@pytest.mark.parametrize("settings", [PiSSA(**SMALL), OLoRA(**SMALL, dropout=0.0)])
def test_increments_follow_the_path_of_the_factors_themselves(tmp_path, settings):
    """On an fp32 base nothing is lost by taking the start out: both train alike."""
    directory = save_tiny(tmp_path / "base")
    beside = Bench(directory, settings, FP32(), lr=1e-3)
    inside = Bench(directory, settings.model_copy(update={"mode": "requantise"}), FP32(), lr=1e-3)
    for path, layer in beside.attached.layers.items():  # the start is rounded to bf16 inside
        other = inside.attached.layers[path]
        layer.a0.copy_(other.a.detach())
        layer.b0.copy_(other.b.detach())
    for _ in range(8):
        assert beside.step() == pytest.approx(inside.step(), rel=1e-5)


def test_requantised_the_base_is_what_the_start_leaves(tmp_path):
    layer = one_layer(PiSSA(**SMALL, mode="requantise"), 33, 57)
    assert torch.equal(layer.a.bfloat16().float(), layer.a)
    rest = original(layer.base) - layer.scale * (layer.b @ layer.a).detach()
    assert torch.equal(layer.base.dense(), quantise(rest, NF4(), CPU).dense())
    error = (layer.base.dense() - rest).norm() / rest.norm()
    assert error < 0.11
    perturb(layer)
    assert layer.start.keys() == {"a0", "b0"}


def test_switched_off_a_requantised_adapter_is_not_the_base_and_says_so(tmp_path):
    directory = save_tiny(tmp_path / "base")
    inside = Bench(directory, PiSSA(**SMALL, mode="requantise"))
    beside = Bench(directory, PiSSA(**SMALL))
    assert beside.attached.is_base_unchanged
    assert not inside.attached.is_base_unchanged
    with inside.attached.disabled():
        assert not torch.allclose(inside.logits(), beside.logits(), atol=0.1)


def test_a_saved_start_is_replayed_to_the_bit_and_not_found_again(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path / "base")
    for settings in (PiSSA(**SMALL, mode="requantise"), PiSSA(**SMALL)):
        first = Bench(directory, settings)
        first.step()
        saved = {name: t.clone() for name, t in first.attached.state().items()}
        with monkeypatch.context() as patch:
            patch.setattr("qlora_lite.methods.pissa.principal_factors", None)
            second = Bench(directory, settings, saved=saved)
        assert torch.equal(second.logits(), first.logits())


def test_an_adapter_taken_out_of_the_base_is_not_begun_from_a_plain_one():
    layer = one_layer(PiSSA(**SMALL), 33, 57)
    pair = one_layer(PiSSA(**SMALL), 33, 57).factors()
    with pytest.raises(AdapterError, match="cannot begin from a plain LoRA"):
        layer.warm_start(pair)
