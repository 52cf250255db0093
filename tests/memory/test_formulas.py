"""Every formula against something independent: real tensors, autograd graphs, or traces."""

import pytest
import torch
from bitsandbytes import functional as bnb
from live_bytes import LiveBytes
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from qlora_lite.kernels.cross_entropy import linear_cross_entropy
from qlora_lite.memory import formulas
from qlora_lite.model.shape import ModelShape, model_shape

SHAPES = [(64, 64), (48, 80), (7, 9), (1000, 96)]
"""Whole blocks, broken blocks, an odd number of weights, more than one nested block."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kind", "block_size", "double_quant"),
    [("nf4", 32, True), ("nf4", 64, False), ("fp4", 64, True), ("nf4", 256, True)],
)
def test_4bit_bytes_are_those_of_bitsandbytes(shape, kind, block_size, double_quant):
    codes, state = bnb.quantize_4bit(
        torch.randn(shape),
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type=kind,
    )
    held = [codes, state.absmax]
    if double_quant:
        held += [state.state2.absmax, state.offset]
    real = sum(t.nbytes for t in held)
    assert formulas.packed_bytes(*shape, kind, block_size, double_quant) == real


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_bytes_are_those_of_bitsandbytes(shape):
    codes, scales, _ = bnb.int8_vectorwise_quant(torch.randn(shape).half())
    assert formulas.packed_bytes(*shape, "int8") == codes.nbytes + scales.nbytes


@pytest.mark.parametrize(
    ("kind", "double_quant", "billions"),
    [("nf4", False, 3.93), ("nf4", True, 3.60), ("int8", True, 6.98), ("bf16", True, 13.96)],
)
def test_the_linear_layers_of_an_8b_model_have_the_published_sizes(kind, double_quant, billions):
    total = sum(
        formulas.packed_bytes(p.d_out, p.d_in, kind, 64, double_quant)
        for p in LLAMA_8B.linears.values()
    )
    assert total == pytest.approx(billions * 1e9, abs=0.01e9)


@pytest.mark.parametrize("num", [4096, 5000, 65536])
def test_adam_bytes_are_those_of_torchs_moments(num):
    parameter = nn.Parameter(torch.randn(num))
    parameter.grad = torch.randn(num)
    adam = torch.optim.AdamW([parameter])
    adam.step()
    moments = [v for v in adam.state[parameter].values() if v.dim()]
    assert formulas.optimizer_bytes(num, "32bit") == sum(m.nbytes for m in moments)


def test_8bit_moments_take_a_quarter_plus_scales():
    assert formulas.optimizer_bytes(2**20, "8bit") == 2 * (2**20 + 4 * 2**12)


# -- activations: what autograd really saves -------------------------------------------------------

TINY = {
    "llama": LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "mistral": MistralConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
    ),
    "qwen3": Qwen3Config(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    ),
    "gpt2": GPT2Config(vocab_size=50, n_embd=64, n_layer=3, n_head=4, n_positions=64),
}
RANK = 8


class Adapted(nn.Module):
    """A frozen linear layer with a LoRA, in plain torch."""

    def __init__(self, linear: nn.Module, d_in: int, d_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(RANK, d_in, dtype=dtype))
        self.b = nn.Parameter(torch.randn(d_out, RANK, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.a.T @ self.b.T * 2


def saved_bytes_per_layer(
    config, dtype: torch.dtype, attention: str, rows: int, tokens: int
) -> int:
    """Bytes that the second decoder layer saves for backward, two documents packed in each row."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.eval().requires_grad_(False)
    layers = model.base_model.h if config.model_type == "gpt2" else model.base_model.layers
    for layer in layers:
        for path, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear | Conv1D):
                sizes = module.weight.shape
                d_in, d_out = sizes if isinstance(module, Conv1D) else reversed(sizes)
                parent, _, name = path.rpartition(".")
                setattr(layer.get_submodule(parent), name, Adapted(module, d_in, d_out, dtype))
    resident = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}
    before: list[int] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: before.append(sum(saved.values())))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    ids = torch.randint(0, 50, (rows, tokens))
    positions = torch.arange(tokens).remainder(tokens // 2).expand(rows, tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    return before[2] - before[1]


def saved_bytes(shape: ModelShape, b: int, attention: str, row_tokens: int, rank: int) -> int:
    num_linears = sum(p.block == 0 for p in shape.linears.values())
    return formulas.saved_bytes_per_token(
        shape.hidden,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.ff,
        num_linears * rank,
        b,
        attention,
        row_tokens,
        gated=shape.gated,
        qk_norm=shape.qk_norm,
        layer_norm=shape.layer_norm,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TINY)
def test_a_layer_saves_what_autograd_saves(family, dtype):
    rows, tokens = 2, 32
    real = saved_bytes_per_layer(TINY[family], dtype, "sdpa", rows, tokens)
    per_token = saved_bytes(model_shape(TINY[family]), dtype.itemsize, "sdpa", tokens, RANK)
    assert rows * tokens * per_token == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_eager_attention_saves_its_probabilities(family, dtype):
    rows, tokens = 2, 64
    real = saved_bytes_per_layer(TINY[family], dtype, "eager", rows, tokens)
    per_token = saved_bytes(model_shape(TINY[family]), dtype.itemsize, "eager", tokens, RANK)
    assert rows * tokens * per_token == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2"])
def test_no_module_of_a_layer_has_a_larger_output_than_the_largest_activation(name):
    model, tokens = AutoModelForCausalLM.from_config(TINY[name]).float(), 24
    shape, sizes = model_shape(TINY[name]), []
    for layer in model.get_submodule(shape.blocks).children():
        for module in layer.modules():
            module.register_forward_hook(
                lambda m, x, y: sizes.append(y.nbytes) if isinstance(y, Tensor) else None
            )
    model(torch.arange(tokens)[None])
    width = shape.heads * shape.head_dim
    assert max(sizes) == formulas.largest_activation_bytes(tokens, shape.hidden, width, shape.ff)


# -- the same against traces of the real sizes, in bf16 without a mask, rank 8 ---------------------

LLAMA_8B = model_shape(
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
)
QWEN_14B = model_shape(
    Qwen3Config(
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
    )
)
LLAMA_70B = model_shape(
    LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
)
ROTARY_BYTES = 4 * 128
"""Per token; the traces count these tables, which all layers share."""


@pytest.mark.parametrize(
    ("shape", "kept", "peak_at_8192"),
    [(LLAMA_8B, 185_080, 2.284e9), (QWEN_14B, 250_840, 2.991e9), (LLAMA_70B, 365_432, 4.534e9)],
    ids=["llama-8b", "qwen3-14b", "llama-70b"],
)
def test_real_sizes_agree_with_traces_of_one_layer(shape, kept, peak_at_8192):
    per_token = saved_bytes(shape, 2, "flash_attention_2", 8192, 8)
    assert per_token + ROTARY_BYTES == kept
    backward = formulas.backward_bytes_per_token(shape.hidden, shape.ff, 2)
    assert 8192 * (kept + backward) == pytest.approx(peak_at_8192, rel=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_bytes_are_the_peak_of_the_real_loss(dtype):
    tokens, hidden, vocab, chunk = 1024, 32, 4000, 128
    head = torch.randn(vocab, hidden, dtype=dtype)
    targets = torch.randint(0, vocab, (1, tokens))
    with LiveBytes([head, targets]) as live:
        states = torch.randn(1, tokens, hidden, dtype=dtype).requires_grad_()
        loss = linear_cross_entropy(states, targets, lambda h: h @ head.T, chunk_tokens=chunk)
    assert loss.isfinite()
    predicted = formulas.loss_bytes(tokens, chunk, vocab, hidden, dtype.itemsize)
    assert predicted == pytest.approx(live.peak, rel=0.02)


# -- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "row_tokens", "checkpointed", "kept"),
    [
        (LLAMA_8B, 2048, 46.7, 32.1),
        (LLAMA_8B, 8192, 54.0, 37.8),
        (QWEN_14B, 2048, 86.7, 59.3),
        (LLAMA_70B, 2048, 428.6, 288.6),
    ],
)
def test_operations_per_token_agree_with_a_hand_computed_table(
    shape, row_tokens, checkpointed, kept
):
    weights = sum(p.num_weights for p in shape.linears.values())
    lora = sum(formulas.lora_parameters(p.d_out, p.d_in, 16) for p in shape.linears.values())
    width = shape.heads * shape.head_dim
    for checkpointing, giga in ((True, checkpointed), (False, kept)):
        flops = formulas.flops_per_token(
            weights,
            lora,
            shape.vocab,
            shape.hidden,
            shape.layers,
            width,
            row_tokens,
            checkpointing,
        )
        assert flops == pytest.approx(giga * 1e9, rel=0.002)
