"""Tiny models of many architectures, from their config classes, with random weights.

model = tiny_of("falcon_h1")
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 400

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
    "n_positions": 512,
    # width
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["attention_hidden_size", "lru_width"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "mamba_d_ssm"], 128),
    **dict.fromkeys(["head_dim", "v_head_dim", "linear_key_head_dim"], 16),
    **dict.fromkeys(["linear_value_head_dim", "mamba_head_dim"], 16),
    # depth
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers"], 4),
    # heads
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "attention_heads"], 4),
    **dict.fromkeys(["num_heads", "mamba_n_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "linear_num_key_heads"], 2),
    "mamba_d_head": 32,
    "mamba_num_heads": 8,
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    # states
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state"], 16),
    **dict.fromkeys(["n_groups", "mamba_n_groups"], 1),
    **dict.fromkeys(["expand", "mamba_expand"], 2),
    "time_step_rank": 8,
    "attention_window_size": 16,
}
"""Small values for the settings of all config classes; each takes those that it has."""

OWN: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": None},
    "lfm2": {"full_attn_idxs": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
}
"""What a family needs besides."""


def tiny_of(family: str, **changes: Any) -> Any:
    """A model of `family` in evaluation mode, fp32, with weights large enough to matter."""
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    sizes = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    sizes |= OWN.get(family, {}) | changes
    config = config_class(**{name: v for name, v in sizes.items() if v is not None})
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
