"""A model directory is loaded in the precision that its files have."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lite.model.quant import BF16, FP32, NF4, Int8
from qlora_lite.run.loading import load_model
from tests.tiny import save_tiny, tiny_tokenizer


@pytest.mark.parametrize(
    ("quant", "settings"),
    [
        (Int8(), {"load_in_8bit": True}),
        (NF4(double_quant=False), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ],
    ids=["int8", "nf4"],
)
def test_a_model_quantised_by_bitsandbytes_stays_as_it_is(tmp_path, quant, settings):
    theirs = AutoModelForCausalLM.from_pretrained(
        save_tiny(tmp_path / "original"), quantization_config=BitsAndBytesConfig(**settings)
    )
    theirs.save_pretrained(tmp_path / "quantised")
    tiny_tokenizer().save_pretrained(tmp_path / "quantised")
    loaded = load_model(str(tmp_path / "quantised"), device="cpu")
    assert loaded.base.quant == quant


@pytest.mark.parametrize(
    ("dtype", "quant"), [(torch.float32, FP32()), (torch.bfloat16, BF16()), (torch.float16, BF16())]
)
def test_a_plain_model_is_loaded_in_its_own_precision(tmp_path, dtype, quant):
    directory = save_tiny(tmp_path / "base", dtype=dtype)
    assert load_model(str(directory), device="cpu").base.quant == quant


def test_a_model_in_the_hubs_cache_is_loaded_in_its_own_precision_too(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    save_tiny(tmp_path / "models--some--model" / "snapshots" / "abc")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    assert load_model("some/model", device="cpu").base.quant == FP32()
