"""Write and read adapters in the format of PEFT, which vLLM and llama.cpp read too.

    adapter_config.json          which modules, and how their pairs are scaled
    adapter_model.safetensors    the pairs, and the fully trained modules

These programs compute different scales as soon as ranks or scales vary between layers. So what we
write is normalised: every scale is folded into B, `lora_alpha == r`, one rank (lower ones are
padded with zeros, modules of rank 0 are left out), full paths, fp32. Adapters that we read may have
any ranks, scales and patterns that PEFT allows.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.layer import Factors
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.quantise import StoredWeight

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that change the base weights, as prefixes of their names."""


def to_peft(
    attached: AttachedAdapter, pairs: Mapping[str, Factors] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's tensors and configuration; both empty if PEFT cannot represent a layer without loss.

    Args:
        pairs: the pairs of the linear layers to write; their lossless pairs unless given.
    """
    embeddings = {path: layer.factors() for path, layer in attached.embeddings.items()}
    if pairs is None:
        found = {path: layer.factors() for path, layer in attached.layers.items()}
        pairs = {path: pair for path, pair in found.items() if pair and not pair.relative_error}
        if len(pairs) < len(found):
            return {}, {}
    is_dora = any(pair.magnitude is not None for pair in pairs.values())
    if is_dora and embeddings:
        return {}, {}  # in PEFT, every module of a DoRA adapter has a magnitude, embeddings too
    nonzero = {path: pair for path, pair in pairs.items() if pair.rank > 0}
    if not nonzero and not embeddings:
        nonzero = {path: _zero_pair(pair) for path, pair in list(pairs.items())[:1]}
    rank = max(pair.rank for pair in (*nonzero.values(), *embeddings.values()))
    tensors: dict[str, Tensor] = {}
    for path, pair in nonzero.items():
        down, up = _padded(pair, rank)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = down
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = up
        if pair.magnitude is not None:
            tensors[f"{_PREFIX}{path}{_MAGNITUDE}"] = pair.magnitude.cpu()
    for path, pair in embeddings.items():
        down, up = _padded(pair, rank)
        tensors[f"{_PREFIX}{path}.lora_embedding_A"] = down
        tensors[f"{_PREFIX}{path}.lora_embedding_B"] = up
    for path, module in attached.full_modules.items():
        for name, parameter in module.named_parameters():
            value = parameter.detach().cpu().float()
            value = value.T if is_transposed(attached, path, value) else value
            tensors[f"{_PREFIX}{path}.{name}"] = value.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [*nonzero, *embeddings],
        "modules_to_save": list(attached.full_modules) or None,
        "lora_dropout": attached.method.settings.dropout,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": is_dora,
        "fan_in_fan_out": _stores_transposed(attached),
    }
    return tensors, config


def _stores_transposed(attached: AttachedAdapter) -> bool:
    """Whether the base stores its weights as (d_in, d_out), as GPT-2's Conv1D does."""
    sources = [layer.base.source for layer in attached.layers.values()]
    return any(isinstance(source, StoredWeight) and source.transposed for source in sources)


def is_transposed(attached: AttachedAdapter, path: str, tensor: Tensor) -> bool:
    """Whether PEFT stores this matrix of a full module as (d_in, d_out), as the base does. Ours is
    (d_out, d_in)."""
    frozen = attached.frozen_modules[path]
    source = frozen.source if isinstance(frozen, FrozenLinear) else None
    return tensor.dim() == 2 and isinstance(source, StoredWeight) and source.transposed


def _zero_pair(pair: Factors) -> Factors:
    """A pair of rank 1 of zeros: PEFT does not read an adapter without modules."""
    down, up = pair.down, pair.up
    return Factors(down.new_zeros(1, down.shape[1]), up.new_zeros(up.shape[0], 1))


def _padded(pair: Factors, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - pair.rank
    down = F.pad(pair.down, (0, 0, 0, missing)).cpu().contiguous()
    return down, F.pad(pair.up, (0, missing)).cpu().contiguous()


@dataclass
class PeftAdapter:
    """A PEFT LoRA directory: folded pairs by path, tensors of full modules by `path.name`."""

    directory: Path
    layers: dict[str, Factors] = field(default_factory=dict)
    embeddings: dict[str, Factors] = field(default_factory=dict)
    full_tensors: dict[str, Tensor] = field(default_factory=dict)
    """As the base stores them: GPT-2's matrices are (d_in, d_out)."""


def read_peft(directory: Path) -> PeftAdapter:
    """Read a PEFT LoRA or DoRA adapter, with any ranks, scales and patterns.

    Raises:
        AdapterError: if it is not a LoRA adapter that can be folded without loss, or is damaged.
    """
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise AdapterError(
            f"{directory} is not a PEFT adapter: it must contain {CONFIG} and {WEIGHTS}. Give the "
            "folder that PEFT's save_pretrained wrote, or a run's adapter/"
        )
    config = read_peft_config(directory)
    _require_plain_lora(directory, config)
    is_dora = bool(config.get("use_dora"))
    adapter = PeftAdapter(directory)
    halves: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    for key, tensor in _read_weights(directory).items():
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?(A|B)(?:\.weight)?", name)
        if name.endswith(_MAGNITUDE):
            magnitudes[name.removesuffix(_MAGNITUDE)] = tensor.float()
        elif match is None:
            adapter.full_tensors[name] = tensor.float()
        else:
            halves.setdefault(f"{match[2] or ''}:{match[1]}", {})[match[3]] = tensor.float()
    for where, pair in halves.items():
        kind, _, path = where.partition(":")
        if set(pair) != {"A", "B"}:
            raise AdapterError(
                f"{directory / WEIGHTS} has only lora_{next(iter(pair))} of {path}; the file is "
                "damaged. Save the adapter again"
            )
        scale = _peft_scale(config, path, pair["A"].shape[0])
        magnitude = None if kind else magnitudes.pop(path, None)
        factors = Factors(pair["A"], pair["B"] * scale, magnitude=magnitude)
        (adapter.embeddings if kind else adapter.layers)[path] = factors
    all_match = all((pair.magnitude is not None) == is_dora for pair in adapter.layers.values())
    if magnitudes or not all_match or (is_dora and adapter.embeddings):
        raise AdapterError(
            f"{directory} has use_dora={is_dora}, but its magnitudes do not match its linear "
            "layers. Leave embeddings out of a DoRA adapter, or copy the adapter again"
        )
    return adapter


def read_peft_config(directory: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        AdapterError: if it is damaged.
    """
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            f"{directory / CONFIG} is damaged ({error}). Copy the adapter again"
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{directory / CONFIG} is damaged: it contains a {type(config).__name__}, not an "
            "object. Copy the adapter again"
        )
    return config


def _read_weights(directory: Path) -> dict[str, Tensor]:
    try:
        return load_file(directory / WEIGHTS)
    except SafetensorError as error:
        raise AdapterError(
            f"{directory / WEIGHTS} is damaged ({error}). Copy the adapter again"
        ) from error


def _require_plain_lora(directory: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{directory / CONFIG} has peft_type={config.get('peft_type')!r}, and LORA is needed. "
            "Merge it with PEFT and use the merged model as the base"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{directory} has bias={config.get('bias')!r}, and only adapters without trained "
            "biases can be read. Merge it with PEFT and use the merged model as the base"
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise AdapterError(
            f"{directory} has init_lora_weights={start!r}, which changed the base weights: the "
            "adapter does not work on the plain base. Save it again with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it with PEFT and use the merged "
            "model as the base"
        )
    alpha, pattern = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    are_numbers = isinstance(pattern, dict) and all(
        isinstance(value, int | float) for value in (alpha, *pattern.values())
    )
    if not are_numbers:
        raise AdapterError(
            f"{directory / CONFIG} is damaged: it has lora_alpha={alpha!r} and "
            f"alpha_pattern={pattern!r}, and numbers are needed to scale the pairs. Copy the "
            "adapter again"
        )


def _peft_scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """The scale by PEFT's rule: patterns match the end of the path; alpha/r or alpha/sqrt(r)."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
