"""The position encoding of a GGUF file, as `rope_parameters` of transformers.

Files state linear and YaRN scaling as keys `rope.scaling.*`. Llama 3's scaling and LongRoPE are
stored as tensors, one factor for each frequency: a frequency is divided by its factor.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.gguf.keys import ArchitectureKeys, shortest_decimal
from qlora_lite.shards.gguf.checkpoint import GgufCheckpoint, TensorSource

FACTORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
AUXILIARY = (FACTORS, LONG, SHORT)
"""Tensors that describe the position encoding. They belong to the config, not to the weights."""

LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Settings of Llama 3.1, 3.2 and 3.3. Only `factor` differs between them."""

FLOAT_ERROR = 2e-6
"""Relative difference of factors that are computed twice in 32 bits in another order."""


def rope_parameters(keys: ArchitectureKeys, rotated: int, context: int) -> dict[str, Any]:
    """The type, base and scaling of the rotary embedding.

    Args:
        rotated: dimensions of a head that are rotated.
        context: number of positions that the file states.

    Raises:
        BaseModelError: if the scaling is not known, or transformers cannot express it.
    """
    theta = float(keys.positive("rope.freq_base", 10_000.0))
    stored = [name for name in AUXILIARY if name in keys.header.tensors]
    kind = keys.text("rope.scaling.type", "longrope" if LONG in stored else "linear")
    keys.flag("rope.scaling.finetuned", False)
    if kind in ("linear", "none"):
        # the second is the older name; 0 means that there is none
        factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0))
        if factor < 0:
            raise keys.wrong("rope.scaling.factor", factor, "a positive number")
        kind = "linear" if kind == "linear" and factor not in (0, 1) else "none"
    if stored not in ([], [FACTORS], [LONG, SHORT]) or (stored == [FACTORS] and kind != "none"):
        raise BaseModelError(
            f"{keys.header.files[0]} has {', '.join(stored)} and a RoPE scaling of type {kind}, "
            "which is not known together. Use the safetensors version of this model"
        )
    if stored == [FACTORS]:
        scaling = _llama3(keys, theta, rotated)
    elif kind == "longrope":
        scaling = _longrope(keys, rotated, context)
    elif kind == "yarn":
        scaling = _yarn(keys, context)
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "none":
        scaling = {"rope_type": "default"}
    else:
        raise keys.wrong("rope.scaling.type", kind, "none, linear, yarn or longrope")
    return {"rope_theta": theta, **scaling}


def _yarn(keys: ArchitectureKeys, context: int) -> dict[str, Any]:
    """Peng et al. 2023, arXiv:2309.00071."""
    original = keys.integer("rope.scaling.original_context_length", context)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": keys.positive("rope.scaling.factor"),
        "original_max_position_embeddings": original,
    }
    keys.require("rope.scaling.yarn_ext_factor", 1.0)
    keys.require("rope.scaling.attn_factor", 1.0)
    for key, field in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if f"rope.scaling.{key}" in keys:
            scaling[field] = keys.positive(f"rope.scaling.{key}")
    if keys.number("rope.scaling.yarn_log_multiplier", 0.0):
        log_multiplier = keys.number("rope.scaling.yarn_log_multiplier")
        scaling |= {"mscale": 1.0, "mscale_all_dim": log_multiplier}
    return scaling


def _longrope(keys: ArchitectureKeys, rotated: int, context: int) -> dict[str, Any]:
    """Ding et al. 2024, arXiv:2402.13753. The factors of long rows are for all that are longer than
    the original context."""
    if LONG not in keys.header.tensors:
        raise keys.wrong("rope.scaling.type", "longrope", f"the tensor {LONG}")
    original = keys.integer("rope.scaling.original_context_length", context)
    factor = context / original
    is_longer = factor > 1 and original > 1
    derived = math.sqrt(1 + math.log(factor) / math.log(original)) if is_longer else 1.0
    attention = keys.positive("rope.scaling.attn_factor", derived)
    scaling = {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "long_factor": [shortest_decimal(x) for x in _factors(keys, LONG, rotated).tolist()],
        "short_factor": [shortest_decimal(x) for x in _factors(keys, SHORT, rotated).tolist()],
    }
    if not math.isclose(attention, derived, rel_tol=1e-6):
        scaling["attention_factor"] = attention
    return scaling


def _llama3(keys: ArchitectureKeys, theta: float, rotated: int) -> dict[str, Any]:
    """The settings of Llama 3's scaling that lead to the stored factors.

    A frequency of wavelength w is divided by

        1                          if w < L / high
        factor                     if w > L / low
        1 / ((1 - s) / factor + s) otherwise, with s = (L / w - low) / (high - low)

    Only the ratios of L, low and high matter, so low is 1.

    Raises:
        BaseModelError: if no settings lead to the factors.
    """
    factors = _factors(keys, FACTORS, rotated)
    if bool((factors == 1).all()):
        return {"rope_type": "default"}
    for settings in ({"factor": factors.max().item()} | s for s in _guesses(factors, theta)):
        found = _llama3_factors(settings, theta, rotated)
        if torch.allclose(found, factors, rtol=FLOAT_ERROR, atol=0):
            return {"rope_type": "llama3", **settings}
    raise BaseModelError(
        f"{keys.header.files[0]}: {FACTORS} does not follow from the RoPE scaling of Llama 3, and "
        "transformers has no other with a factor for each frequency. Use the safetensors version "
        "of this model"
    )


def _guesses(factors: Tensor, theta: float) -> list[dict[str, Any]]:
    """Settings that may have led to the factors: the usual ones, and a fit."""
    f = factors.double()
    exponents = torch.arange(len(f), dtype=torch.float64) / len(f)
    wavelengths = 2 * math.pi * theta**exponents
    between = (f > 1) & (f < f.max())
    w, f = wavelengths[between], f[between]
    s = (1 / f - 1 / factors.max()) / (1 - 1 / factors.max())
    if len(w) > 1:
        slope = ((s[0] - s[-1]) / (1 / w[0] - 1 / w[-1])).item()
        low = slope / w[0].item() - s[0].item()  # s = slope / w - low
        is_scaling = low > 0 and math.isfinite(slope / low)
        fits = [(round(slope / low), f"{1 + 1 / low:.4g}")] if is_scaling else []
    else:  # many settings lead to the same factors: take a context that is a power of 2
        contexts = [2**i for i in range(5, 25)]
        highs = {c: (1 + (c / w - 1) / s).tolist() or [4.0] for c in contexts}
        fits = [(context, f"{highs[context][0]:.6g}") for context in contexts]
    return [LLAMA3] + [
        {
            "low_freq_factor": 1.0,
            "high_freq_factor": float(high),
            "original_max_position_embeddings": context,
        }
        for context, high in fits
        if float(high) > 1
    ]


def _llama3_factors(settings: dict[str, Any], theta: float, rotated: int) -> Tensor:
    """The factors that transformers divides by, float32."""
    config = LlamaConfig(
        hidden_size=rotated,
        num_attention_heads=1,
        max_position_embeddings=10**9,  # less than the original context is warned about
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **settings},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    return 1.0 / theta**exponents / scaled


def _factors(keys: ArchitectureKeys, name: str, rotated: int) -> Tensor:
    """Factors from the file, float32, (rotated / 2,).

    Raises:
        BaseModelError: if they have another number or sign.
    """
    factors = GgufCheckpoint(keys.header, {name: TensorSource(name)}).read(name).float()
    if factors.shape != (rotated // 2,) or not bool(
        (factors > 0).all() and factors.isfinite().all()
    ):
        raise BaseModelError(
            f"{keys.header.files[0]}: {name} has the shape {list(factors.shape)}, and "
            f"{rotated // 2} positive numbers are needed. Download the file again"
        )
    return factors
