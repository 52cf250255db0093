"""Checkpoints that were quantised by bitsandbytes and saved by transformers."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import FP4, NF4, Int8
from qlora_lite.model.settings import Base
from tests.tiny import save_tiny

CPU = choose("cpu")


def bitsandbytes_config(quant) -> BitsAndBytesConfig:
    if isinstance(quant, Int8):
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.kind,
        bnb_4bit_use_double_quant=quant.double_quant,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quant", [NF4(), NF4(double_quant=False), FP4(), Int8()], ids=str)
def test_the_loaded_model_equals_one_quantised_here(tmp_path, quant, family):
    original = save_tiny(tmp_path / "original", family, num_shards=2)
    theirs = AutoModelForCausalLM.from_pretrained(
        original, quantization_config=bitsandbytes_config(quant)
    )
    theirs.save_pretrained(tmp_path / "quantised")
    loaded = load_base(Base(model=str(tmp_path / "quantised"), quant=quant), CPU)
    assert loaded.quant == quant
    assert not hasattr(loaded.config, "quantization_config")
    here = load_base(Base(model=str(original), quant=quant), CPU).model
    stored = loaded.model.state_dict()
    for name, expected in here.state_dict().items():
        # the quantisation constants are stored as JSON with all their digits
        assert torch.equal(stored[name], expected), name
    ids = torch.arange(20)[None]
    assert_close(loaded.model(ids).logits, here(ids).logits, atol=0, rtol=0)


def test_a_quantised_checkpoint_has_no_original_weight(tmp_path, tiny_llama):
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=bitsandbytes_config(NF4())
    )
    theirs.save_pretrained(tmp_path / "quantised")
    model = load_base(Base(model=str(tmp_path / "quantised")), CPU).model
    assert model.model.layers[0].mlp.up_proj.original() is None


def test_another_quantisation_than_the_stored_one_is_refused(tmp_path, tiny_llama):
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=bitsandbytes_config(NF4())
    )
    theirs.save_pretrained(tmp_path / "quantised")
    with pytest.raises(BaseModelError, match=r"base\.quant=int8.*quantised to nf4"):
        load_base(Base(model=str(tmp_path / "quantised"), quant=Int8()), CPU)
