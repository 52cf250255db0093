"""The architectures of GGUF files that are read, and what distinguishes them.

Each is dense and decoder-only. The names on the left are those of llama.cpp, which writes the files
(its folder `conversion/`); the fields are those of the config classes of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.gguf.header import GgufHeader

EMBEDDING, HEAD = "token_embd.weight", "output.weight"

_BIASES = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}


@dataclass(frozen=True)
class Family:
    """How the config of one architecture is read. The defaults are those of Llama."""

    model_type: str
    """Name of its config class in transformers."""
    model_class: str
    epsilon: str = "rms_norm_eps"
    """Field for the epsilon of its norms."""
    feed_forward: str | None = "intermediate_size"
    """Field for the width of the MLP; None if it is four times the hidden size."""
    kv_heads: str | None = "num_key_value_heads"
    """Field for the number of key and value heads; None if each head has its own."""
    has_head_dim: bool = True
    """The config has a head size. Otherwise it is the hidden size over the number of heads."""
    rope: Literal["whole", "partial", "per layer type", "none"] = "whole"
    """Dimensions of a head that are rotated, or that each layer type has its own base."""
    needed: Mapping[str, str] = field(default_factory=dict)
    """Further keys of the architecture, and the fields for their numbers."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """The same, for keys that may be absent."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Fields that are true if a block has this tensor."""


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", flags=_BIASES),
    "granite": Family(
        "granite",
        "GraniteForCausalLM",
        has_head_dim=False,
        needed={"logit_scale": "logits_scaling"},
        flags=_BIASES,
    ),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", has_head_dim=False),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", flags={"attention_bias": "attn_q.bias"}),
    "gemma": Family("gemma", "GemmaForCausalLM"),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        needed={"attention.sliding_window": "sliding_window"},
        optional={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        rope="per layer type",
        optional={"final_logit_softcapping": "final_logit_softcapping"},
    ),
    "phi3": Family("phi3", "Phi3ForCausalLM", has_head_dim=False, rope="partial"),
    "stablelm": Family(
        "stablelm",
        "StableLmForCausalLM",
        epsilon="layer_norm_eps",
        has_head_dim=False,
        rope="partial",
        flags={"use_qkv_bias": "attn_q.bias"},
    ),
    "nemotron": Family(
        "nemotron", "NemotronForCausalLM", epsilon="norm_eps", rope="partial", flags=_BIASES
    ),
    "starcoder2": Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        epsilon="norm_epsilon",
        has_head_dim=False,
        flags={"use_bias": "attn_q.bias"},
    ),
    "command-r": Family(
        "cohere",
        "CohereForCausalLM",
        epsilon="layer_norm_eps",
        has_head_dim=False,
        needed={"logit_scale": "logit_scale"},
        flags={"use_qk_norm": "attn_q_norm.weight", "attention_bias": "attn_q.bias"},
    ),
    "cohere2": Family(
        "cohere2",
        "Cohere2ForCausalLM",
        epsilon="layer_norm_eps",
        has_head_dim=False,
        needed={"logit_scale": "logit_scale", "attention.sliding_window": "sliding_window"},
    ),
    "lfm2": Family(
        "lfm2",
        "Lfm2ForCausalLM",
        epsilon="norm_eps",
        has_head_dim=False,
        needed={"shortconv.l_cache": "conv_L_cache"},
        flags={"conv_bias": "shortconv.conv.bias"},
    ),
    "falcon": Family(
        "falcon",
        "FalconForCausalLM",
        epsilon="layer_norm_epsilon",
        feed_forward="ffn_hidden_size",
        kv_heads="num_kv_heads",
        has_head_dim=False,
        flags={"bias": "attn_qkv.bias"},
    ),
    "bloom": Family(
        "bloom",
        "BloomForCausalLM",
        epsilon="layer_norm_epsilon",
        feed_forward=None,
        kv_heads=None,
        has_head_dim=False,
        rope="none",
    ),
    "gpt2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        epsilon="layer_norm_epsilon",
        feed_forward="n_inner",
        kv_heads=None,
        has_head_dim=False,
        rope="none",
    ),
}


def family_of(header: GgufHeader) -> Family:
    """The family of a file.

    Raises:
        BaseModelError: if it is not supported, or the file is no language model or a part of one.
    """
    file, kind = header.files[0], header.metadata.get("general.type", "model")
    if kind != "model":
        raise BaseModelError(
            f"{file} is of type {kind!r}. A whole language model is needed: give another file"
        )
    if header.architecture not in FAMILIES:
        raise BaseModelError(
            f"{file} has the architecture {header.architecture!r}. GGUF files are supported for "
            f"{', '.join(FAMILIES)}. Use the safetensors version of this model"
        )
    if experts := [name for name in header.tensors if "_exps." in name or "ffn_gate_inp" in name]:
        raise BaseModelError(
            f"{file} has experts ({experts[0]}). GGUF files of dense models are supported: "
            f"{', '.join(FAMILIES)}. Use the safetensors version of this model"
        )
    if EMBEDDING not in header.tensors:
        raise BaseModelError(f"{file} has no tensor {EMBEDDING!r}. Give a file of a whole model")
    return FAMILIES[header.architecture]
