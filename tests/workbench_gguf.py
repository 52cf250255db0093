"""Write a model as a GGUF file, with the keys and the changes of weights that llama.cpp makes.

    model = tiny_gguf_model("falcon_40b")
    path = write_model_gguf(folder / "model.gguf", model)

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

from tests.families import WIDTH, tiny_of
from tests.gguf_metadata import add_metadata, falcon_groups, head_size

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

FALCON = {"ffn_hidden_size": 4 * WIDTH}
"""llama.cpp's converter writes four times the width, whatever the config says."""

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
    "falcon": FALCON,
    "falcon_untied": {**FALCON, "tie_word_embeddings": False},
    "falcon_11b": {
        **FALCON,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
    },
    "falcon_40b": {
        **FALCON,
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


def write_model_gguf(
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
    add_metadata(writer, config)
    if keys is not None:
        keys(writer)
    for name, tensor in (_stored(model) | _extra_tensors(config) | (tensors or {})).items():
        writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
        groups = falcon_groups(config)
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
        return {"rope_freqs.weight": llama3_factors(rope, head_size(config))}
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
