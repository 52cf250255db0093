"""A frozen layer equals the linear layer of its dense weight, in forward and backward."""

import dataclasses
import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from qlora_lite.foundation.device import DeviceRule, choose
from qlora_lite.kernels.product import has_onednn
from qlora_lite.model import frozen as module
from qlora_lite.model.frozen import FrozenEmbedding, FrozenLinear, Scratch, piece_rows
from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8
from qlora_lite.model.quantise import quantise

CPU = choose("cpu")
QUANTS = [NF4(), NF4(double_quant=False, block_size=128), FP4(), Int8(), BF16(), FP32()]


def frozen_linear(quant, d_out=48, d_in=100, rule: DeviceRule = CPU) -> FrozenLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, d_in, generator=generator) / d_in**0.5
    return quantise(weight, quant, rule, bias=torch.randn(d_out, generator=generator))


def reference(layer: FrozenLinear) -> nn.Linear:
    plain = nn.Linear(layer.d_in, layer.d_out, dtype=layer.compute, device=layer.weight.device)
    plain.weight.data, plain.bias.data = layer.dense(), layer.bias.data.to(layer.compute)
    return plain


@pytest.mark.parametrize("products", ["torch", "onednn"])
@pytest.mark.parametrize("pieces", ["one piece", "pieces"])
@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_forward_and_gradient_are_those_of_the_dense_weight(quant, pieces, products, monkeypatch):
    if products == "onednn" and not has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    if pieces == "pieces":
        monkeypatch.setattr(module, "PIECE_WEIGHTS", 2000)
    layer = frozen_linear(quant, rule=dataclasses.replace(CPU, products=products))
    assert layer.products == products
    x = torch.randn(2, 3, 100, requires_grad=True)
    y, expected = layer(x), reference(layer)(x)
    assert_close(y, expected, atol=1e-6, rtol=1e-6)
    upstream = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, upstream)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_input_gradients_of_pieces_are_summed_in_fp32(monkeypatch):
    # 1,024 pieces of one row each; in bf16 a sum of ones stops growing at 256
    monkeypatch.setattr(module, "PIECE_WEIGHTS", 64)
    layer = quantise(torch.ones(1024, 64), NF4(double_quant=False), choose("cpu", "bf16"))
    assert len(list(layer.pieces())) == 1024
    x = torch.zeros(2, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(found, torch.full_like(x, 1024))


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_forward_is_matmul_plus_bias_bit_for_bit(quant):
    layer, x = frozen_linear(quant), torch.randn(4, 100)
    assert torch.equal(layer(x), layer.matmul(x) + layer.bias)


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_dense_is_a_copy_that_outlives_the_scratch(quant):
    layer = frozen_linear(quant)
    dense = layer.dense()
    before = dense.clone()
    dense_again = layer.dense()
    layer(torch.randn(4, 100))
    assert torch.equal(dense, before)
    dense.zero_()
    assert torch.equal(layer.dense(), dense_again)


def test_layers_can_share_one_scratch():
    scratch = Scratch()
    weights = [torch.randn(32, 64), torch.randn(96, 64)]
    small, large = (quantise(w, NF4(), CPU, scratch=scratch) for w in weights)
    x = torch.randn(5, 64, requires_grad=True)
    y = large(x)
    small(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert_close(found, large.dense().sum(0).expand(5, -1), atol=1e-5, rtol=1e-5)


def test_nothing_dequantised_is_saved_for_backward():
    layer, x = frozen_linear(NF4()), torch.randn(4, 100, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.matmul(x)
    assert saved == []


def test_backward_reads_the_codes_from_their_current_storage():
    """Streaming and ZeRO-3 release the codes after forward and restore them for backward."""
    layer, x = frozen_linear(NF4()), torch.randn(4, 100, requires_grad=True)
    y = layer.matmul(x)
    expected = torch.ones(4, 48) @ layer.dense()
    codes = layer.weight.data.clone()
    storage = layer.weight.data.untyped_storage()
    layer.weight.data = torch.empty(0, dtype=torch.uint8)
    assert not [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and same(o, storage)]
    layer.weight.data = codes
    (found,) = torch.autograd.grad(y.sum(), x)
    assert_close(found, expected)


def same(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    try:
        return tensor.untyped_storage().data_ptr() == storage.data_ptr()
    except (NotImplementedError, RuntimeError):
        return False  # sparse tensors and the like have no storage


@pytest.mark.parametrize(
    ("quant", "num_bits"),
    [
        # 256 x 256 weights: codes of 4 bits, and one scale for each block of 64
        (NF4(double_quant=False), 65_536 * 4 + 1024 * 32),
        # the 1,024 scales as codes of 8 bits, 4 scales of these codes, and their mean
        (NF4(), 65_536 * 4 + 1024 * 8 + 4 * 32 + 32),
        (FP4(block_size=128, double_quant=False), 65_536 * 4 + 512 * 32),
        (Int8(), 65_536 * 8 + 256 * 32),
        (BF16(), 65_536 * 16),
        (FP32(), 65_536 * 32),
    ],
    ids=str,
)
def test_a_layer_has_exactly_the_bits_of_its_codes_and_scales(quant, num_bits):
    assert quantise(torch.randn(256, 256), quant, CPU).num_bytes * 8 == num_bits


def test_pieces_are_complete_rows_and_blocks():
    assert piece_rows(1000, 4096) == 1000
    assert piece_rows(128256, 4096, 64) == 2**26 // 4096
    rows = piece_rows(10**6, 1001, 64)
    assert rows * 1001 % 64 == 0
    assert rows * 1001 <= 2**26


def test_forward_and_backward_run_on_fake_tensors():
    with FakeTensorMode():
        layer = FrozenLinear(
            96,
            64,
            NF4(double_quant=False),
            torch.float32,
            torch.empty(96 * 64 // 2, 1, dtype=torch.uint8),
            {"scales": torch.empty(96)},
        )
        x = torch.empty(2, 64, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (2, 96)
        assert x.grad.shape == (2, 64)


def test_an_embedding_is_stored_in_bf16_and_returns_the_compute_dtype():
    table = torch.randn(10, 8).bfloat16()
    embedding = FrozenEmbedding(table, torch.float32, scale=torch.tensor(3.0))
    ids = torch.tensor([[1, 9], [0, 1]])
    assert torch.equal(embedding(ids), table.float()[ids] * 3)
    assert torch.equal(embedding.dense(), table.float())
    assert embedding.dense().data_ptr() != embedding.weight.data_ptr()
    assert embedding.num_bytes == 160


@pytest.mark.gpu
@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_on_cuda_forward_and_gradient_are_those_of_the_dense_weight(quant):
    layer = frozen_linear(quant, d_in=128, rule=choose("cuda"))
    x = torch.randn(2, 3, 128, device="cuda", dtype=layer.compute, requires_grad=True)
    y, expected = layer(x), reference(layer)(x)
    assert_close(y, expected)
    upstream = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, upstream)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    assert_close(found, wanted)
