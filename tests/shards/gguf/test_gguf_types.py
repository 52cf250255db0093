"""Dequantised bits against gguf, with libgguf and without."""

import numpy as np
import pytest
import torch

from qlora_lite.shards.gguf import types
from qlora_lite.shards.gguf.types import FLOATS, QUANTISED, block_size, dequantise, kind_of
from tests.gguf_files import oracle


@pytest.mark.parametrize("kind", QUANTISED)
def test_any_bytes_have_the_bits_of_gguf(kind, recwarn, monkeypatch):
    weights, num_bytes = block_size(kind)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (64, num_bytes), generator=generator, dtype=torch.uint8).numpy()
    native, fallback = torch.empty(64, weights), torch.empty(64, weights)
    dequantise(kind, packed, native)
    monkeypatch.setattr(types, "NATIVE", None)
    dequantise(kind, packed, fallback)
    finite = fallback.isfinite()  # random scales may be infinite; the sign of NaN is open
    assert finite.sum() > 32 * weights
    assert torch.equal(native.view(torch.int32)[finite], fallback.view(torch.int32)[finite])
    assert torch.equal(native.isfinite(), finite)
    assert not recwarn.list
    with np.errstate(all="ignore"):
        assert torch.equal(oracle(kind, packed)[finite], fallback[finite])


def test_numbers_have_the_names_of_the_format():
    assert [kind_of(number) for number in (0, 1, 3, 12, 30)] == [
        "F32",
        "F16",
        "Q4_1",
        "Q4_K",
        "BF16",
    ]
    assert kind_of(4) == "number 4"
    assert set(FLOATS).isdisjoint(QUANTISED)
