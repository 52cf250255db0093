"""Quantising in chunks gives the codes that bitsandbytes gives for the whole tensor."""

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import save_file

from qlora_lite.foundation.device import choose
from qlora_lite.model import quantise as module
from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8
from qlora_lite.model.quantise import StoredWeight, quantise
from qlora_lite.shards.reader import SafetensorsCheckpoint

CPU = choose("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(d_out=48, d_in=100, dtype=torch.bfloat16):
    """A weight with rows of 100, which do not end at block borders."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(d_out, d_in, generator=generator) * 0.02).to(dtype)


@pytest.fixture(params=["one chunk", "many chunks", "many chunks in threads"])
def chunks(request, monkeypatch):
    num_threads = torch.get_num_threads()
    if request.param != "one chunk":
        monkeypatch.setattr(module, "CHUNK_WEIGHTS", {"cpu": 1000, "cuda": 1000})
    if request.param == "many chunks in threads":
        torch.set_num_threads(3)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("kind", "block_size", "double_quant", "dtype"),
    [
        (NF4, 32, False, torch.float32),
        (NF4, 64, True, torch.bfloat16),
        (NF4, 256, False, torch.float16),
        (NF4, 4096, True, torch.float32),
        (FP4, 32, True, torch.float16),
        (FP4, 64, False, torch.float32),
        (FP4, 256, True, torch.float32),
        (FP4, 4096, False, torch.bfloat16),
    ],
)
def test_4bit_codes_and_scales_are_those_of_bitsandbytes(kind, block_size, double_quant, dtype):
    quant = kind(block_size=block_size, double_quant=double_quant)
    weight = random_weight(dtype=dtype)
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type=quant.kind
    )
    frozen = quantise(weight, quant, CPU)
    assert torch.equal(frozen.weight, codes)
    assert torch.equal(frozen.scales, state.absmax)
    if double_quant:
        assert torch.equal(frozen.nested_scales, state.state2.absmax)
        assert torch.equal(frozen.nested_map, state.state2.code)
        assert torch.equal(frozen.offset, state.offset)


@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 33)])
@pytest.mark.parametrize("quant", [NF4(), FP4(double_quant=False), Int8()])
def test_the_error_of_small_and_odd_weights_is_bounded(shape, quant):
    weight = random_weight(*shape, dtype=torch.float32)
    error = (quantise(weight, quant, CPU).dense() - weight).abs().max()
    # half the widest gap between values: 0.15 of a block's maximum for nf4, 1/6 for fp4
    assert error <= weight.abs().max() * (0.004 if quant.kind == "int8" else 0.17)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_and_scales_are_those_of_bitsandbytes(dtype):
    weight = random_weight(dtype=dtype)
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    frozen = quantise(weight, Int8(), CPU)
    assert torch.equal(frozen.weight, codes)
    assert torch.equal(frozen.scales, scales)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("quant", [NF4(), Int8(), BF16(), FP32()])
def test_a_weight_stored_transposed_gives_the_same_codes(tmp_path, quant):
    weight = random_weight()
    save_file({"w": weight, "t": weight.T.contiguous()}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint.open(tmp_path)
    plain = quantise(StoredWeight(checkpoint, "w"), quant, CPU)
    transposed = quantise(StoredWeight(checkpoint, "t", transposed=True), quant, CPU)
    assert torch.equal(plain.weight, transposed.weight)
    assert torch.equal(plain.original(), weight)
    assert torch.equal(transposed.original(), weight)


@pytest.mark.usefixtures("chunks")
def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    quantise(random_weight(), NF4(), CPU)
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("chunks")
def test_the_result_of_split_is_quantised_instead_of_the_weight():
    """As LoftQ does: quantise the weight minus a low-rank part."""
    weight, part = random_weight(), torch.full((48, 100), 0.01)
    seen = []

    def split(dense, round_trip):
        seen.append(dense)
        assert torch.equal(round_trip(dense), quantise(dense, NF4(), CPU).dense())
        return dense - part

    frozen = quantise(weight, NF4(), CPU, split=split)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], weight.float())
    assert torch.equal(frozen.weight, quantise(weight.float() - part, NF4(), CPU).weight)
    assert torch.equal(frozen.original(), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", [NF4(), FP4(double_quant=False), Int8()])
def test_on_cuda_the_codes_are_those_of_bitsandbytes_on_cuda(quant):
    rule, weight = choose("cuda"), random_weight().cuda()
    frozen = quantise(weight, quant, rule)
    if quant.kind == "int8":
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    else:
        codes, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=quant.double_quant, quant_type=quant.kind
        )
        scales = state.absmax
    assert torch.equal(frozen.weight, codes)
    assert torch.equal(frozen.scales, scales)
