"""The exact bits of each precision, and how a recipe spells it."""

import pytest
from pydantic import TypeAdapter, ValidationError

from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8, Quant


def test_bits_per_weight_count_codes_and_scales():
    # a block of 64: 64 codes of 4 bits, one scale of 32 bits
    assert NF4(double_quant=False).bits_per_weight() == (64 * 4 + 32) / 64
    # 256 blocks of 64: codes, 256 scales of 8 bits, one of 32
    assert NF4().bits_per_weight() == (256 * 64 * 4 + 256 * 8 + 32) / (256 * 64)
    assert FP4(block_size=128, double_quant=False).bits_per_weight() == 4.25
    assert Int8().bits_per_weight(64) == 8.5
    assert (BF16().bits_per_weight(), FP32().bits_per_weight()) == (16, 32)


@pytest.mark.parametrize("quant", [NF4(block_size=128), FP4(), Int8(), BF16(), FP32()])
def test_a_quant_survives_its_own_json(quant):
    adapter = TypeAdapter(Quant)
    assert adapter.validate_json(adapter.dump_json(quant)) == quant


def test_block_sizes_are_those_of_bitsandbytes():
    with pytest.raises(ValidationError):
        NF4(block_size=100)
