"""Metadata of GGUF files, family by family, as the converters of llama.cpp write them.

add_metadata(writer, model.config)
"""

import math
from collections.abc import Callable
from typing import Any

import gguf
from gguf import GGUFWriter


def add_metadata(writer: GGUFWriter, config: Any) -> None:
    """What describes the model, and its vocabulary."""
    _METADATA[config.model_type](writer, config)
    _add_tokens(writer, config)


def _add_tokens(writer: GGUFWriter, config: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    pieces = ["t", "o", "to", "k", "tok"]
    others = [f"token{i}" for i in range(len(pieces), config.vocab_size)]
    writer.add_token_list(pieces + others)
    writer.add_token_merges(["t o", "to k"])
    for add, token in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, config.eos_token_id),
        (writer.add_pad_token_id, config.pad_token_id),
    ):
        if token is not None:
            add(token)


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


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama(writer: GGUFWriter, config: Any) -> None:
    _usual(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_size(config))


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
    writer.add_rope_dimension_count(int(share * head_size(config)))
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
    writer.add_head_count_kv(falcon_groups(config))
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(0)


def falcon_groups(config: Any) -> int:
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
