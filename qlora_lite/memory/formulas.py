"""Formulas for the memory and operations of each part of a QLoRA step, on plain numbers.

Bytes are for one device; "a token" is a token of one micro-batch. `b` is the size of an element in
the compute dtype: 4 on CPU (fp32), 2 on CUDA (bf16, fp16).
"""

import math
from typing import Literal

QuantKind = Literal["nf4", "fp4", "int8", "bf16", "fp32"]
States = Literal["32bit", "8bit", "paged_8bit"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]

FP32 = 4

# -- stored weights --------------------------------------------------------------------------------


def packed_bytes(
    d_out: int, d_in: int, kind: QuantKind, block_size: int = 64, double_quant: bool = True
) -> int:
    """Codes and scales of a frozen weight, in bitsandbytes' storage format.

    4 bit: two codes per byte and an fp32 scale per block. Double quantisation stores a scale in one
    byte, with an fp32 scale per 256 of them and one fp32 mean. int8: an fp32 scale per row.
    The look-up tables (64 bytes and 1 KiB) are shared by all layers and not counted.
    """
    return code_bytes(d_out * d_in, kind) + scale_bytes(d_out, d_in, kind, block_size, double_quant)


def code_bytes(num_weights: int, kind: QuantKind) -> int:
    """Codes of a frozen weight, or the weight itself if it is not quantised."""
    match kind:
        case "fp32":
            return num_weights * 4
        case "bf16":
            return num_weights * 2
        case "int8":
            return num_weights
    return math.ceil(num_weights / 2)


def scale_bytes(
    d_out: int, d_in: int, kind: QuantKind, block_size: int = 64, double_quant: bool = True
) -> int:
    """Scales of a frozen weight; 0 if it is not quantised."""
    match kind:
        case "fp32" | "bf16":
            return 0
        case "int8":
            return FP32 * d_out
    num_blocks = math.ceil(d_out * d_in / block_size)
    if not double_quant:
        return FP32 * num_blocks
    return num_blocks + FP32 * math.ceil(num_blocks / 256) + FP32


# -- what is trained -------------------------------------------------------------------------------


def lora_parameters(d_out: int, d_in: int, rank: int) -> int:
    """A (rank, d_in) and B (d_out, rank)."""
    return rank * (d_in + d_out)


def optimizer_bytes(num: int, states: States) -> int:
    """Adam's two moments of `num` parameters: fp32, or 8 bit with an fp32 scale per 256.

    bitsandbytes keeps the moments of tensors below 4096 elements in fp32; this is negligible.
    """
    if states == "32bit":
        return 2 * FP32 * num
    return 2 * (num + FP32 * math.ceil(num / 256))


def flat_optimizer_bytes(num: int) -> int:
    """The states of `FlatAdamW` (`training/zero_engine.py`): two moments, a count of steps and a
    flag, in fp32."""
    return 4 * FP32 * num


def flat_update_bytes(num: int) -> int:
    """What exists only during a step of `FlatAdamW` on a share of `num` numbers: the gradient in
    one tensor, and 33 bytes of intermediates, measured."""
    return (FP32 + 33) * num


def update_bytes(num: int, element_bytes: int, rounding: Literal["master", "stochastic"]) -> int:
    """What exists only during the optimizer step of `num` parameters: with stochastic rounding
    their values in fp32, unless they are stored in fp32."""
    return FP32 * num if rounding == "stochastic" and element_bytes != FP32 else 0


# -- activations -----------------------------------------------------------------------------------


def saved_bytes_per_token(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ff: int,
    sum_of_ranks: int,
    b: int,
    attention: Attention,
    row_tokens: int,
    *,
    gated: bool,
    qk_norm: bool,
    layer_norm: bool,
) -> int:
    """Bytes per token that one decoder layer saves for backward, without checkpointing.

    Exact for the plain modules of transformers 5 with LoRA on every linear layer (Llama, Mistral,
    Qwen3, GPT-2), and close for similar models.

    Args:
        sum_of_ranks: of the adapters of this layer; each saves its low-rank activation.
        row_tokens: tokens of a row. The mask that separates packed documents has this many numbers
            per token, and with a mask sdpa repeats keys and values for all heads. Eager attention
            saves its probabilities, per head, in fp32 and in `b`.
    """
    width = head_dim * heads
    kv_width = head_dim * kv_heads
    if layer_norm:
        norms = 2 * (2 * b * hidden) + 4 * b  # input and output; mean and deviation
    else:
        norms = 2 * (FP32 + b) * hidden + 2 * FP32  # fp32 copy and output; root mean square
    if qk_norm:
        norms += FP32 * (width + kv_width) + FP32 * (heads + kv_heads)
    match attention:
        case "sdpa":
            repeated = width if kv_heads > 1 else kv_width  # a single head is not copied
            attended = 2 * b * (width + repeated) + FP32 * heads + b * row_tokens
        case "eager":
            copies = FP32 + (b if b != FP32 else 0)
            attended = 4 * b * width + copies * heads * row_tokens
        case "flash_attention_2":
            attended = 2 * b * (width + kv_width) + FP32 * heads
    # gated: gate, its activation, up, their product; plain: the intermediates of a tanh GELU
    mlp = (4 if gated else 5) * b * ff
    return norms + attended + mlp + b * sum_of_ranks


def backward_bytes_per_token(hidden: int, ff: int, b: int) -> int:
    """Temporary bytes per token in the backward of one layer, in addition to saved activations:
    three gradients as wide as the MLP and one of the residual stream. Within 0.3 % of traces of
    Llama 8B, 70B and Qwen3 14B."""
    return b * (3 * ff + hidden)


def largest_activation_bytes(num_tokens: int, hidden: int, width: int, ff: int) -> int:
    """The largest tensor in a layer, in fp32: in bf16 compute, norms make some tensors fp32.

    Args:
        width: of all heads together.
    """
    return FP32 * num_tokens * max(hidden, width, ff)


def loss_bytes(
    num_tokens: int, chunk_tokens: int, vocab: int, hidden: int, b: int, logit_copies: int = 3
) -> int:
    """Temporary bytes of the chunked loss, with every token trained: the decoder's output, its
    trained rows and their gradient; for one chunk, in fp32, the log-probabilities and two
    gradients, and more for a method with an extra loss on the logits."""
    logits = min(chunk_tokens, num_tokens) * vocab * logit_copies * FP32
    return logits + 3 * b * num_tokens * hidden


# -- time ------------------------------------------------------------------------------------------


def flops_per_token(
    linear_weights: int,
    adapter_parameters: int,
    vocab: int,
    hidden: int,
    layers: int,
    attention_width: int,
    row_tokens: int,
    checkpointing: bool,
    has_teacher: bool = False,
) -> float:
    """Floating-point operations per trained token, in rows of one document.

    A frozen weight costs 2 in forward and 2 for the input's gradient, and 2 more if the layer is
    recomputed; the weight itself has no gradient. The head is not recomputed. Attention is causal,
    so half of the row on average, and its backward costs 2.5 forwards. A teacher costs one more
    forward of the base.
    """
    recompute = 1 if checkpointing else 0
    teacher = 1 if has_teacher else 0
    linears = linear_weights * (4 + 2 * recompute + 2 * teacher)
    adapters = adapter_parameters * (6 + 2 * recompute)
    head = (4 + 2 * teacher) * vocab * hidden
    attention = 2 * row_tokens * attention_width * layers * (3.5 + recompute + teacher)
    return linears + adapters + head + attention


# -- rows ------------------------------------------------------------------------------------------

ROW_BYTES, UNPACKED_ROW_BYTES = 280, 400
"""Python's lists of lengths and of the bins of two epochs, and two numbers per row. Measured: 120
to 280 bytes with packing, and 290 to 400 without, where every row is a bin. Of 100,000 rows and
more the upper end is freed memory that the allocator keeps."""


def rows_bytes(num_tokens: int, num_rows: int, *, packing: bool) -> int:
    """Main memory of tokenised rows: an int32 id and a mask byte per token, and the batches."""
    return 5 * num_tokens + (ROW_BYTES if packing else UNPACKED_ROW_BYTES) * num_rows
