"""Tiny models of many architectures, from their config classes, with random weights.

model = tiny_of("falcon_h1")
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 400

WIDTH, HEADS, KV_HEADS, HEAD_DIM, DEPTH = 64, 4, 2, 16, 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 512),
    # width
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "emb_dim"], WIDTH),
    **dict.fromkeys(["attention_hidden_size", "lru_width", "embedding_size"], WIDTH),
    **dict.fromkeys(["input_embedding_size", "output_embedding_size"], WIDTH),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "mamba_d_ssm", "ffn_hidden_size"], 128),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff", "d_inner"], 128),
    **dict.fromkeys(["intermediate_size_mlp", "dense_intermediate_size"], 128),
    **dict.fromkeys(["feed_forward_size", "prefix_dense_intermediate_size"], 128),
    **dict.fromkeys(["head_dim", "v_head_dim", "linear_key_head_dim", "dim_head"], HEAD_DIM),
    **dict.fromkeys(["linear_value_head_dim", "mamba_head_dim", "kv_channels"], HEAD_DIM),
    **dict.fromkeys(["qk_nope_head_dim", "index_head_dim", "d_head", "swa_head_dim"], HEAD_DIM),
    **dict.fromkeys(["linear_head_dim", "indexer_head_dim", "attention_head_size"], HEAD_DIM),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 8),
    # depth
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers"], DEPTH),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers"], DEPTH),
    **dict.fromkeys(["num_encoder_layers", "num_blocks"], DEPTH),
    # heads
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "attention_heads"], HEADS),
    **dict.fromkeys(["num_heads", "mamba_n_heads", "linear_num_value_heads"], HEADS),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], HEADS),
    **dict.fromkeys(["swa_num_attention_heads", "index_n_heads", "linear_num_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "linear_num_key_heads", "num_kv_heads"], KV_HEADS),
    **dict.fromkeys(["swa_num_key_value_heads", "num_query_groups"], KV_HEADS),
    "mamba_d_head": 32,
    "mamba_num_heads": 8,
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    "moe_num_experts": 4,
    **dict.fromkeys(
        ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts"], 2
    ),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["shared_expert_intermediate_size", "shared_intermediate_size"], 32),
    **dict.fromkeys(["n_group", "topk_group"], 1),
    # states
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state"], 16),
    **dict.fromkeys(["n_groups", "mamba_n_groups"], 1),
    **dict.fromkeys(["expand", "mamba_expand"], 2),
    "time_step_rank": 8,
    "attention_window_size": 16,
    # others
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "image_size": 32,
    "patch_size": 8,
}
"""Small values for the settings of all config classes; each takes those that it has."""

LATENT = {"num_key_value_heads": HEADS, "head_dim": 8}
"""Multi-head latent attention: a key and a value for each head; the rotated part is the head."""

CONVOLUTIONS = ["conv", "full_attention", "conv", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}

OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "dots1": {"n_shared_experts": 1},
    "falcon": {"head_dim": None},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": CONVOLUTIONS},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "prophetnet": {"num_hidden_layers": None},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"v_head_dim": None, "num_blocks": None},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 16, "attention_hidden_size": 2 * WIDTH},
    "zamba2": {
        "attention_hidden_size": 2 * WIDTH,
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3, 5],
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides; None leaves a setting out."""


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """The config of a small model; its parts (text, images) are small too."""
    return _tiny(CONFIG_MAPPING[family], changes)


def _tiny(config_class: type[PretrainedConfig], changes: dict[str, Any]) -> PretrainedConfig:
    default = config_class()
    sizes = {name: value for name, value in SIZES.items() if _has(default, name)}
    if _has(default, "kv_lora_rank"):
        sizes |= LATENT
    for name in config_class.sub_configs:
        inner = getattr(default, name, None)
        if isinstance(inner, PretrainedConfig):
            sizes[name] = _tiny(type(inner), {}).to_dict()
    sizes |= OWN.get(default.model_type, {}) | changes
    return config_class(**{name: v for name, v in sizes.items() if v is not None})


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except (NotImplementedError, RuntimeError, ValueError):  # it differs between layers
        return True


UNBUILT = {
    "blt": "its sizes are spread over four configs",
    "dots3_note": "its layers have different sizes; its text model is dots3_note_text",
    "gemma3n": "its image tower is in timm",
    "gemma4_assistant": "it reads the states of another model",
    "gemma4_unified_assistant": "it reads the states of another model",
    "musicgen": "it generates sound",
    "musicgen_melody": "it generates sound",
}
"""Families without a small model here, and why."""

ALL = tuple(family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in UNBUILT)
"""All other causal language models of the installed transformers."""


def tiny_of(family: str, **changes: Any) -> Any:
    """A model of `family` in evaluation mode, fp32, with weights large enough to matter."""
    config = tiny_config(family, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.125)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


LISTED: dict[str, str] = {
    "llama": "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-MoE",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5": "Qwen3.5, text and images",
    "qwen3_5_text": "Qwen3.5, text",
    "qwen3_5_moe": "Qwen3.5-MoE, text and images",
    "qwen3_5_moe_text": "Qwen3.5-MoE, text",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M and 1B",
    "gemma3": "Gemma 3 4B, 12B, 27B",
    "gemma4_text": "Gemma 4, text",
    "gemma4": "Gemma 4, text and images",
    "mistral": "Mistral 7B, Mistral Nemo",
    "ministral3": "Ministral 3",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "gpt_oss": "gpt-oss, unquantised",
    "phi3": "Phi-3, Phi-3.5, Phi-4",
    "glm4": "GLM-4 9B, 32B",
    "glm4_moe": "GLM-4.5, GLM-4.6",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "smollm3": "SmolLM3",
    "lfm2": "LFM2",
    "lfm2_moe": "LFM2-MoE",
    "granite": "Granite 3",
    "granitemoehybrid": "Granite 4",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "deepseek_v2": "DeepSeek-V2, V2-Lite",
    "deepseek_v3": "DeepSeek-V3, R1, in 16 bit",
    "stablelm": "StableLM",
    "falcon_h1": "Falcon-H1",
    "gpt2": "GPT-2",
    "gpt_neox": "Pythia, GPT-NeoX",
    "opt": "OPT",
    "falcon": "Falcon 7B, 40B",
    "bloom": "Bloom",
}
"""The families that are tried from end to end, and models of each."""

ALSO_TRAINED = (
    *("arcee", "dots1", "ernie4_5_moe", "exaone4", "gptj", "hunyuan_v1_moe", "jamba", "laguna"),
    *("minimax", "olmo_hybrid", "persimmon", "seed_oss", "xglm"),
)
"""Others that are tried in the same way."""
