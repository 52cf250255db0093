"""Write and read adapters in the format of PEFT, which vLLM and llama.cpp read too.

    adapter_config.json          which modules, and how their pairs are scaled
    adapter_model.safetensors    the pairs, and the fully trained modules

These programs compute different scales as soon as ranks or scales vary between layers. So what we
write is normalised: every scale is folded into B, `lora_alpha == r`, one rank (lower ones are
padded with zeros, modules of rank 0 are left out), full paths, fp32. Adapters that we read may have
any ranks, scales and patterns that PEFT allows.
"""

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
from qlora_lite.adapters.peft_config import CONFIG, read_peft_config, require_plain_lora
from qlora_lite.adapters.peft_targets import require_named_layers
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.sealed import read_sealed, require_files
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.quantise import StoredWeight

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAGNITUDE = ".lora_magnitude_vector"


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
    require_plain_lora(directory, config)
    is_dora = bool(config.use_dora)
    adapter = PeftAdapter(directory)
    halves: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    for key, tensor in _read_weights(directory).items():
        name = key.removeprefix(_PREFIX)
        match = re.fullmatch(r"(.+)\.lora_(embedding_)?(A|B)(?:\.weight)?", name)
        if name.endswith(_MAGNITUDE):
            magnitudes[name.removesuffix(_MAGNITUDE)] = tensor
        elif match is None:
            adapter.full_tensors[name] = tensor
        else:
            halves.setdefault(f"{match[2] or ''}:{match[1]}", {})[match[3]] = tensor
    for where, pair in halves.items():
        kind, _, path = where.partition(":")
        _require_pair(directory, path, pair, config.rank(path))
        magnitude = None if kind else magnitudes.pop(path, None)
        factors = Factors(pair["A"], pair["B"] * config.scale(path), magnitude=magnitude)
        (adapter.embeddings if kind else adapter.layers)[path] = factors
    pairs = (*adapter.layers, *adapter.embeddings)
    require_named_layers(directory, config, pairs, adapter.full_tensors)
    all_match = all(
        is_dora == (pair.magnitude is not None and pair.magnitude.shape == pair.up.shape[:1])
        for pair in adapter.layers.values()
    )
    if magnitudes or not all_match or (is_dora and adapter.embeddings):
        raise AdapterError(
            f"{directory} has use_dora={is_dora}, but its magnitudes do not match its linear "
            "layers. Leave embeddings out of a DoRA adapter, or copy the adapter again"
        )
    return adapter


def _require_pair(directory: Path, path: str, pair: Mapping[str, Tensor], rank: int) -> None:
    """Check that A is (rank, d_in) and B (d_out, rank).

    Raises:
        AdapterError: if one is missing or has another shape.
    """
    if set(pair) != {"A", "B"}:
        raise AdapterError(
            f"{directory / WEIGHTS} has only lora_{next(iter(pair))} of {path}; the file is "
            "damaged. Save the adapter again"
        )
    a, b = pair["A"], pair["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{path} of {directory} has factors of {tuple(a.shape)} and {tuple(b.shape)}; needed "
            "are (rank, d_in) and (d_out, rank) of a linear layer. The file is damaged, or adapts "
            "other kinds of layers: save it again without them"
        )
    if a.shape[0] != rank:
        raise AdapterError(
            f"{path} of {directory} has rank {a.shape[0]}, and {rank} according to {CONFIG} "
            "(r and rank_pattern), so its scale is unknown. Copy the adapter again"
        )


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors, in fp32.

    Raises:
        AdapterError: if the file is damaged, or has values that are not finite.
    """
    try:
        tensors = load_file(directory / WEIGHTS)
        if (directory / "qlora_lite.json").is_file():  # one of ours
            require_files(directory, read_sealed(directory / "qlora_lite.json"), WEIGHTS)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(
            f"{directory / WEIGHTS} is damaged ({error}). Copy the adapter again"
        ) from error
    if not tensors:
        raise AdapterError(f"{directory / WEIGHTS} has no tensors. Copy the adapter again")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise AdapterError(
                f"{directory / WEIGHTS}: {name} has dtype {tensor.dtype}, and floating-point "
                "numbers are needed. Copy the adapter again"
            )
        tensors[name] = tensor.float()
        if not tensors[name].isfinite().all():
            raise AdapterError(
                f"{directory / WEIGHTS}: {name} has values that are not finite. Its training "
                "diverged, or the file is damaged: use an earlier checkpoint, or copy it again"
            )
    return tensors
