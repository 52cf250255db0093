"""The operator against its definition, and against the operators of bitsandbytes."""

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.functional import QuantState
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_lite.kernels import dequantise as module
from qlora_lite.kernels.dequantise import dequantise, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# whole blocks; rows that end inside a block; odd rows; an odd number of weights; under one block
SHAPES = [(64, 128), (33, 96), (4, 33), (7, 33), (3, 5)]


def quantised(
    shape: tuple[int, int], kind: str, block_size: int
) -> tuple[torch.Tensor, QuantState]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return bitsandbytes.functional.quantize_4bit(weight, blocksize=block_size, quant_type=kind)


def run(codes, scales, kind, block_size, shape, dtype, operator=dequantise):
    out = torch.full(shape, float("nan"), dtype=dtype)
    operator(codes, scales, kind, block_size, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [*zip(SHAPES, [32, 64, 512, 64, 4096], strict=True), ((64, 128), 4096), ((7, 33), 32)],
)
def test_4bit_equals_its_definition_bit_for_bit(shape, block_size, kind, dtype):
    codes, state = quantised(shape, kind, block_size)
    found = run(codes, state.absmax, kind, block_size, shape, dtype)
    expected = run(codes, state.absmax, kind, block_size, shape, dtype, reference)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 128), (33, 96), (4, 33)])
def test_4bit_equals_the_operator_of_bitsandbytes(shape, kind, dtype):
    codes, state = quantised(shape, kind, 64)
    # as one row: their CPU kernel uses the wrong scales if rows end inside a block
    size = shape[0] * shape[1]
    theirs = torch.ops.bitsandbytes.dequantize_4bit.default(
        codes, state.absmax, 64, kind, (1, size), dtype
    )
    assert torch.equal(run(codes, state.absmax, kind, 64, shape, dtype), theirs.view(shape))


def test_the_largest_weight_of_a_block_and_zero_are_exact():
    weight = torch.zeros(1, 64)
    weight[0, 3], weight[0, 40] = -2.0, 0.5
    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=32, quant_type="nf4")
    assert torch.equal(run(codes, state.absmax, "nf4", 32, (1, 64), torch.float32), weight)


def test_without_the_private_kernel_the_result_is_the_same(monkeypatch):
    codes, state = quantised((33, 96), "nf4", 64)
    expected = run(codes, state.absmax, "nf4", 64, (33, 96), torch.float32)
    monkeypatch.setattr(module, "_kernel", lambda kind, dtype: None)
    assert torch.equal(run(codes, state.absmax, "nf4", 64, (33, 96), torch.float32), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_equals_bitsandbytes(shape, dtype, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 100)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    theirs = bitsandbytes.functional.int8_vectorwise_dequant(codes, scales).to(dtype)
    assert torch.equal(run(codes, scales, "int8", 1, shape, dtype), theirs)
    assert torch.equal(run(codes, scales, "int8", 1, shape, dtype, reference), theirs)


def test_a_plain_weight_is_cast():
    weight = torch.randn(5, 7).bfloat16()
    assert torch.equal(run(weight, None, "plain", 1, (5, 7), torch.float32), weight.float())


def test_fake_tensors_work_and_shapes_are_checked():
    with FakeTensorMode():
        codes = torch.empty(64 * 128 // 2, 1, dtype=torch.uint8)
        out = torch.empty(64, 128)
        dequantise(codes, torch.empty(128), "nf4", 64, out)
        with pytest.raises(RuntimeError, match="codes for"):
            dequantise(codes[:5], torch.empty(128), "nf4", 64, out)


def test_torch_accepts_the_operator():
    codes, state = quantised((8, 64), "nf4", 64)
    out = torch.empty(8, 64)
    torch.library.opcheck(dequantise, (codes, state.absmax, "nf4", 64, out))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_equals_the_definition(shape, kind, dtype):
    codes, state = quantised(shape, kind, 64)
    out = torch.empty(shape, dtype=dtype, device="cuda")
    dequantise(codes.cuda(), state.absmax.cuda(), kind, 64, out)
    assert torch.equal(out.cpu(), run(codes, state.absmax, kind, 64, shape, dtype, reference))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_int8_equals_the_definition(dtype):
    weight = torch.randn(33, 96).half()
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    out = torch.empty(33, 96, dtype=dtype, device="cuda")
    dequantise(codes.cuda(), scales.cuda(), "int8", 1, out)
    assert torch.equal(out.cpu(), run(codes, scales, "int8", 1, (33, 96), dtype, reference))
