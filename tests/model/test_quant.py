"""The settings of quantisation."""

import pytest
from pydantic import TypeAdapter, ValidationError

from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8, Quant


@pytest.mark.parametrize("quant", [NF4(block_size=128), FP4(), Int8(), BF16(), FP32()])
def test_a_quant_survives_its_own_json(quant):
    adapter = TypeAdapter(Quant)
    assert adapter.validate_json(adapter.dump_json(quant)) == quant


def test_block_sizes_are_those_of_bitsandbytes():
    with pytest.raises(ValidationError):
        NF4(block_size=100)
