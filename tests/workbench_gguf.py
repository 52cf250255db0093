"""Write a model as a GGUF file, with the keys and the changes of weights that llama.cpp makes.

    model = tiny_gguf_model("falcon_40b")
    path = write_gguf(folder / "model.gguf", model)

Written from the converters of llama.cpp (its folder `conversion/`), family by family, and not from
our reader. Weights are in F32.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor

from tests.families import tiny_of

ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "granite": MODEL_ARCH.GRANITE,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
    "stablelm": MODEL_ARCH.STABLELM,
    "nemotron": MODEL_ARCH.NEMOTRON,
    "starcoder2": MODEL_ARCH.STARCODER2,
    "cohere": MODEL_ARCH.COMMAND_R,
    "cohere2": MODEL_ARCH.COHERE2,
    "lfm2": MODEL_ARCH.LFM2,
    "falcon": MODEL_ARCH.FALCON,
    "bloom": MODEL_ARCH.BLOOM,
    "gpt2": MODEL_ARCH.GPT2,
}


CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama_wide_heads": {"head_dim": 32},
    "mistral": {"sliding_window": None},
    "granite": {
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
    },
    "qwen2": {"rms_norm_eps": 1e-5},
    "qwen3": {"head_dim": 128},  # transformers reads no other
    "qwen3_narrow_heads": {"attention_bias": True},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 8, "attn_logit_softcapping": 20.0},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 6},
    "gemma3_text_without_window": {
        "query_pre_attn_scalar": 16,
        "layer_types": ["full_attention"] * 4,
        "final_logit_softcapping": 5.0,
    },
    "phi3": {"bos_token_id": None, "eos_token_id": 3},
    "phi3_partial": {"partial_rotary_factor": 0.75, "sliding_window": 8, "eos_token_id": 3},
    "stablelm": {"use_qkv_bias": True},
    "stablelm_parallel": {"use_parallel_residual": True, "partial_rotary_factor": 0.5},
    "nemotron": {},
    "nemotron_biased": {"attention_bias": True, "mlp_bias": True},
    "starcoder2": {"bos_token_id": 1, "eos_token_id": 2},
    "starcoder2_unbiased": {"use_bias": False, "bos_token_id": 1, "eos_token_id": 2},
    "cohere": {"logit_scale": 0.25, "eos_token_id": 3},
    "cohere_normed": {"use_qk_norm": True, "eos_token_id": 3},
    "cohere2": {"sliding_window": 8, "eos_token_id": 3},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "falcon": {},
    "falcon_untied": {"tie_word_embeddings": False},
    "falcon_11b": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
    },
    "falcon_40b": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 2,
    },
    "bloom": {},
    "gpt2": {"max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 2},
    "gpt2_untied": {
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 2,
    },
}
"""Models of every family, in the kinds that a file can have."""

QUICK = ("llama", "gemma3_text", "gpt2")

ALL_CASES = [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]


def tiny_gguf_model(case: str, **changes: Any) -> Any:
    """Its vectors are multiples of 2^-10: adding 1 to a norm and subtracting it is exact."""
    family = max((f for f in ARCHITECTURES if case.startswith(f)), key=len)
    model = tiny_of(family, **CASES[case] | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_((parameter * 1024).round() / 1024)
    return model


def write_gguf(
    path: Path,
    model: Any,
    *,
    keys: Callable[[GGUFWriter], object] | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Write `model`, with further keys and tensors."""
    config = model.config
    family = config.model_type
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("Tiny")
    _METADATA[family](writer, config)
    _add_tokens(writer, config)
    if keys is not None:
        keys(writer)
    for name, tensor in (_stored(model) | _extra_tensors(config) | (tensors or {})).items():
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokens(writer: GGUFWriter, config: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    for add, token in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, config.eos_token_id),
        (writer.add_pad_token_id, config.pad_token_id),
    ):
        if token is not None:
            add(token)


# ---- metadata ------------------------------------------------------------------------------------


def _usual(writer: GGUFWriter, config: Any, **changes: Any) -> None:
    """What most converters write."""
    h = config.to_dict() | changes
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(h["intermediate_size"])
    writer.add_head_count(config.num_attention_heads)
    if "num_key_value_heads" in h:
        writer.add_head_count_kv(h["num_key_value_heads"])
    rope = h.get("rope_parameters") or {}
    local = rope.get("sliding_attention", {}).get("rope_theta")
    rope = rope.get("full_attention", rope)
    match rope.get("rope_type"):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            for key, add in (
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
                ("mscale_all_dim", writer.add_rope_scaling_yarn_log_mul),
            ):
                if rope.get(key) is not None:
                    add(rope[key])
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    if local is not None:
        writer.add_rope_freq_base_swa(local)
    for key in ("rms_norm_eps", "norm_eps"):
        if key in h:
            writer.add_layer_norm_rms_eps(h[key])
    for key in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if key in h:
            writer.add_layer_norm_eps(h[key])
    if h.get("head_dim") is not None:
        writer.add_key_length(h["head_dim"])
        writer.add_value_length(h["head_dim"])
    writer.add_file_type(0)


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama(writer: GGUFWriter, config: Any) -> None:
    _usual(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(_head_size(config))


def _granite(writer: GGUFWriter, config: Any) -> None:
    _llama(writer, config)
    for add, value in (
        (writer.add_attention_scale, config.attention_multiplier),
        (writer.add_embedding_scale, config.embedding_multiplier),
        (writer.add_residual_scale, config.residual_multiplier),
        (writer.add_logit_scale, config.logits_scaling),
    ):
        if value:
            add(value)


def _gemma(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_file_type(0)


def _gemma2(writer: GGUFWriter, config: Any) -> None:
    _gemma(writer, config)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    _usual(writer, config)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if "sliding_attention" in config.layer_types:
        writer.add_sliding_window(config.sliding_window)


def _phi3(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    share = rope.get("partial_rotary_factor", 1.0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(share * config.hidden_size) // config.num_attention_heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config.sliding_window or 0)
    writer.add_file_type(0)
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        scale = config.max_position_embeddings / original
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(attention)


def _stablelm(writer: GGUFWriter, config: Any) -> None:
    share = config.rope_parameters["partial_rotary_factor"]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(int(share * _head_size(config)))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_parallel_residual(True)  # the configs of StableLM 3B do not have it
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_file_type(0)


def _nemotron(writer: GGUFWriter, config: Any) -> None:
    _usual(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_eps(config.norm_eps)
    share = config.rope_parameters["partial_rotary_factor"]
    writer.add_rope_dimension_count(int(share * config.hidden_size) // config.num_attention_heads)
    if config.rope_parameters.get("factor") is None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _cohere(writer: GGUFWriter, config: Any) -> None:
    _usual(writer, config)
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _cohere2(writer: GGUFWriter, config: Any) -> None:
    _cohere(writer, config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def _lfm2(writer: GGUFWriter, config: Any) -> None:
    """Key heads by layer, 0 for convolutions; the adjusted width of the MLP."""
    by_layer = [0 if kind == "conv" else config.num_key_value_heads for kind in config.layer_types]
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    _usual(writer, config, num_key_value_heads=by_layer, intermediate_size=width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_shortconv_l_cache(config.conv_L_cache)


def _falcon(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_tensor_data_layout("jploski")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_falcon_groups(config))
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(0)


def _falcon_groups(config: Any) -> int:
    return config.num_kv_heads if config.new_decoder_architecture else 1


def _bloom(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(0)


def _gpt2(writer: GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(0)


_METADATA: dict[str, Callable[[GGUFWriter, Any], None]] = {
    "llama": _llama,
    "mistral": _llama,
    "granite": _granite,
    "qwen2": _usual,
    "qwen3": _usual,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "stablelm": _stablelm,
    "nemotron": _nemotron,
    "starcoder2": _usual,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "lfm2": _lfm2,
    "falcon": _falcon,
    "bloom": _bloom,
    "gpt2": _gpt2,
}


# ---- tensors -------------------------------------------------------------------------------------


def _stored(model: Any) -> dict[str, Tensor]:
    """Every weight under its name in the file, changed as the converters do."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    stored = {}
    for name, weight in model.named_parameters():
        stem, _, ending = name.rpartition(".")
        if config.model_type == "bloom":
            stem = re.sub(r"transformer\.", "", stem)
        stored[f"{names.get_name(stem)}.{ending}"] = _changed(name, weight.detach(), config)
    assert len(stored) == len(list(model.named_parameters()))
    return stored


def _changed(name: str, weight: Tensor, config: Any) -> Tensor:
    family = config.model_type
    if family in ("gemma", "gemma2", "gemma3_text", "nemotron") and name.endswith("norm.weight"):
        weight = weight + 1
    elif family in ("llama", "mistral", "granite") and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        weight = _pairs_from_halves(weight, heads)
    elif family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        weight = weight.T
    elif family == "lfm2" and "conv.conv" in name and weight.dim() == 3:
        weight = weight.squeeze(1)
    elif family == "bloom" and "query_key_value" in name:
        weight = _ungrouped(weight, config.n_head, 1)
    elif family == "falcon" and "query_key_value" in name:
        groups = _falcon_groups(config)
        weight = _ungrouped(weight, groups, config.num_attention_heads // groups)
    return weight


def _pairs_from_halves(weight: Tensor, heads: int) -> Tensor:
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def _ungrouped(weight: Tensor, groups: int, queries: int) -> Tensor:
    """All queries, then all keys, then all values."""
    split = weight.reshape(groups, queries + 2, -1, *weight.shape[1:])
    parts = split[:, :-2], split[:, -2:-1], split[:, -1:]
    return torch.cat([part.reshape(-1, *weight.shape[1:]) for part in parts])


def _extra_tensors(config: Any) -> dict[str, Tensor]:
    """Factors of RoPE."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope, _head_size(config))}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"])
            for kind in ("long", "short")
        }
    return {}


def llama3_factors(rope: dict[str, float], head_dim: int) -> Tensor:
    """One divisor for each frequency, computed number by number."""
    base = rope["rope_theta"]
    factor, low, high = (rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    context = rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (i / head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)
