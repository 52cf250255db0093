"""Adapters as files: PEFT's directory, and our own state beside it.

    adapter_config.json, adapter_model.safetensors   what PEFT, vLLM and llama.cpp read
    native.safetensors                               all that the layers are, in its own dtype
    qlora_lite.json                                  what the others do not record
    README.md                                        where there is no PEFT form: why, what to do

PEFT, vLLM and llama.cpp compute the scale of an adapter differently as soon as ranks or scales vary
between layers. So what is written is normalised: every scale is folded into B, `lora_alpha == r`,
one rank (lower ones are padded with zeros, modules of rank 0 are left out), full paths, fp32. All
consumers then agree.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from qlora_lite.adapters.attach import Attached
from qlora_lite.adapters.layer import Factors
from qlora_lite.adapters.method import AdapterSettings
from qlora_lite.adapters.start import by_layer
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.files import write_json, write_text
from qlora_lite.model.freeze import StoredWeight
from qlora_lite.model.frozen import FrozenLinear

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NATIVE = "native.safetensors"
SIDECAR = "qlora_lite.json"
_PREFIX = "base_model.model."
_COPY = ".base_layer.weight"

FREE_TO_CHANGE = ("start", "dropout", "dtype", "lr_ratio")
"""Settings that may differ from those of an adapter whose own state is taken as it is."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's starts that take something out of the base's weights, as prefixes of their names."""


def save_adapter(
    directory: Path,
    attached: Attached,
    *,
    base: str,
    revision: str | None,
    fan_in_fan_out: bool,
    sidecar: dict[str, Any],
) -> None:
    """Write all files of an adapter into an existing, empty directory.

    Args:
        base: the base's hub id or absolute path, for the consumers.
        fan_in_fan_out: the base keeps its weights as (d_in, d_out), as GPT-2 does.
        sidecar: what the PEFT format does not record.
    """
    native = {n: t.cpu().contiguous() for n, t in attached.state().items()}
    save_file(native, directory / NATIVE, {"format": "pt"})
    tensors, config = to_peft(attached) if attached.keeps_base else ({}, {})
    if config:
        config |= {
            "base_model_name_or_path": base,
            "revision": revision,
            "fan_in_fan_out": fan_in_fan_out,
        }
        save_file(tensors, directory / WEIGHTS, {"format": "pt"})
        write_json(directory / CONFIG, config)
    else:
        write_text(directory / "README.md", _without_peft(attached))
    write_json(directory / SIDECAR, sidecar | {"peft": bool(config)})


def save_at_rank(
    directory: Path,
    attached: Attached,
    rank: int,
    *,
    base: str,
    revision: str | None,
    fan_in_fan_out: bool,
) -> float:
    """Write the PEFT form of an adapter cut to `rank`, and return the largest relative error.

    It is 0 for a method that trained every rank (DyLoRA), and that of the best approximation for
    one that has it (MoRA).

    Raises:
        AdapterError: if the method has no pair of this rank, or is right on its own base only.
    """
    if not attached.keeps_base:
        raise AdapterError(
            f"adapter={attached.method.settings.kind} with these settings changed the base's own "
            "weights before it quantised them, so no adapter of it is right on another base. "
            "Merge the run"
        )
    pairs = {p: _cut(p, layer.factors(rank), rank) for p, layer in attached.layers.items()}
    largest = max(pair.rank for pair in pairs.values())
    if largest < rank:
        raise AdapterError(
            f"there is no adapter of rank {rank} here: {largest} is the largest that was trained"
        )
    tensors, config = to_peft(attached, pairs)
    error = max(pair.relative_error for pair in pairs.values())
    config |= {
        "base_model_name_or_path": base,
        "revision": revision,
        "fan_in_fan_out": fan_in_fan_out,
    }
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    write_json(directory / CONFIG, config)
    recorded = attached.method.settings.model_dump(mode="json")
    write_json(directory / SIDECAR, {"adapter": recorded, "rank": rank, "relative_error": error})
    return error


def _cut(path: str, pair: Factors | None, rank: int) -> Factors:
    if pair is None or pair.magnitude is not None:
        raise AdapterError(
            f"{path} has no adapter of rank {rank}: its method trained one rank, or this is above "
            "it. DyLoRA can be cut to any rank up to its own, MoRA approximated"
        )
    return pair


def _without_peft(attached: Attached) -> str:
    """What somebody who looks for a PEFT adapter has to know."""
    kind = attached.method.settings.kind
    why = (
        f"What `{kind}` with these settings learned has no form as a PEFT adapter without loss."
        if attached.keeps_base
        else f"`{kind}` with these settings changed the base's own weights before it quantised "
        "them: the adapter is right on that base only, and wrong on any other."
    )
    return (
        f"There is no PEFT adapter here. {why}\n\nMerge it: `qlora-lite merge RUN OUT` makes the "
        f"base again from `{NATIVE}` and writes plain merged weights.\n"
    )


def to_peft(
    attached: Attached, pairs: Mapping[str, Factors] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """PEFT's tensors and configuration; both empty if a layer has no lossless form there.

    Args:
        pairs: what to write of the linear layers, in place of their lossless pairs.
    """
    embeddings = {path: layer.factors() for path, layer in attached.embeddings.items()}
    if pairs is None:
        found = {path: layer.factors() for path, layer in attached.layers.items()}
        pairs = {path: pair for path, pair in found.items() if pair and not pair.relative_error}
        if len(pairs) < len(found):
            return {}, {}
    is_dora = any(pair.magnitude is not None for pair in pairs.values())
    if is_dora and embeddings:
        return {}, {}  # PEFT gives every module of a DoRA adapter a magnitude, embeddings too
    kept = {path: pair for path, pair in pairs.items() if pair.rank > 0}
    if not kept and not embeddings:
        kept = {path: _of_zeros(pair) for path, pair in list(pairs.items())[:1]}
    rank = max(pair.rank for pair in (*kept.values(), *embeddings.values()))
    tensors: dict[str, Tensor] = {}
    for path, pair in kept.items():
        down, up = _padded(pair, rank)
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = down
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = up
        if pair.magnitude is not None:
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = pair.magnitude.cpu()
    for path, pair in embeddings.items():
        down, up = _padded(pair, rank)
        tensors[f"{_PREFIX}{path}.lora_embedding_A"] = down
        tensors[f"{_PREFIX}{path}.lora_embedding_B"] = up
    for path, module in attached.whole.items():
        for name, parameter in module.named_parameters():
            value = parameter.detach().cpu().float()
            value = value.T if _is_transposed(attached, path, value) else value
            tensors[f"{_PREFIX}{path}.{name}"] = value.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [*kept, *embeddings],
        "modules_to_save": list(attached.whole) or None,
        "lora_dropout": attached.method.settings.dropout,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": is_dora,
    }
    return tensors, config


def _is_transposed(attached: Attached, path: str, tensor: Tensor) -> bool:
    """PEFT keeps this matrix as its base does, (d_in, d_out); a whole module as (d_out, d_in)."""
    bare = attached.bare[path]
    source = bare.source if isinstance(bare, FrozenLinear) else None
    return tensor.dim() == 2 and isinstance(source, StoredWeight) and source.transposed


def _of_zeros(pair: Factors) -> Factors:
    """Rank 1 and nothing in it: PEFT does not read an adapter without any module."""
    down, up = pair.down, pair.up
    return Factors(down.new_zeros(1, down.shape[1]), up.new_zeros(up.shape[0], 1))


def _padded(pair: Factors, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - pair.rank
    down = F.pad(pair.down, (0, 0, 0, missing)).cpu().contiguous()
    return down, F.pad(pair.up, (0, missing)).cpu().contiguous()


@dataclass
class PeftAdapter:
    """A PEFT LoRA directory, read: folded pairs by path, whole modules' tensors by `path.name`."""

    directory: Path
    layers: dict[str, Factors] = field(default_factory=dict)
    embeddings: dict[str, Factors] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    """As the base stores them: GPT-2's matrices are (d_in, d_out)."""


def require_adapter(directory: Path) -> None:
    """A quick look, before anything large is read.

    Raises:
        AdapterError: if the directory holds no adapter.
    """
    has_peft = (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()
    if not has_peft and not (directory / NATIVE).is_file():
        raise AdapterError(
            f"{directory} is not an adapter directory: {CONFIG} and {WEIGHTS} are needed there. "
            "Give the folder that PEFT's save_pretrained wrote, or a run's adapter/"
        )


def read_peft(directory: Path) -> PeftAdapter:
    """Read a PEFT LoRA adapter with whatever ranks, scales and patterns it has.

    Raises:
        AdapterError: if it is not a LoRA adapter that can be folded without loss.
    """
    require_adapter(directory)
    if not (directory / CONFIG).is_file():
        raise AdapterError(
            f"{directory} has no PEFT form ({CONFIG}): its method leaves as merged weights, and "
            "only a recipe with the same method and settings can begin from it. Merge its run and "
            "take the merged model as base.model, or take the adapter settings of its recipe.json"
        )
    config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    _refuse_what_is_not_lora(directory, config)
    adapter = PeftAdapter(directory)
    halves: dict[str, dict[str, Tensor]] = {}
    with safe_open(directory / WEIGHTS, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
            name = key.removeprefix(_PREFIX)
            match = re.fullmatch(r"(.+)\.lora_(embedding_)?(A|B)(?:\.weight)?", name)
            if match is None:
                adapter.whole[name] = file.get_tensor(key).float()
            else:
                halves.setdefault(f"{match[2] or ''}:{match[1]}", {})[match[3]] = file.get_tensor(
                    key
                ).float()
    for where, pair in halves.items():
        kind, _, path = where.partition(":")
        if set(pair) != {"A", "B"}:
            raise AdapterError(
                f"{directory / WEIGHTS} has only lora_{next(iter(pair))} of {path}; the file is "
                "damaged. Save the adapter again"
            )
        scale = _peft_scale(config, path, pair["A"].shape[0])
        factors = Factors(pair["A"], pair["B"] * scale)
        (adapter.embeddings if kind else adapter.layers)[path] = factors
    return adapter


def _refuse_what_is_not_lora(directory: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{directory} is a {config.get('peft_type')} adapter; a LORA one is needed. "
            "Merge it with PEFT and use the merged model as the base"
        )
    if config.get("use_dora") or config.get("bias", "none") != "none":
        raise AdapterError(
            f"{directory} has use_dora={config.get('use_dora')} and bias={config.get('bias')!r}; "
            "only plain LoRA without trained biases can be read. Merge it with PEFT and use the "
            "merged model as the base"
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise AdapterError(
            f"{directory} has init_lora_weights={start!r}, which changed the base's own weights: "
            "the adapter is wrong on the plain base. Save it again with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it with PEFT and use the merged "
            "model as the base"
        )


def _peft_scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """PEFT's own rule: patterns match the end of the path; alpha/r or alpha/sqrt(r)."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def begin_from(attached: Attached, directory: Path) -> None:
    """Start from an existing adapter: our own state of the same method, or PEFT factors.

    Raises:
        AdapterError: if a tensor of the adapter finds no place, or a shape differs.
    """
    saved = saved_start(directory, attached.method.settings)
    if saved is not None:
        fresh = {name: tensor.clone() for name, tensor in attached.state().items()}
        attached.load_state(saved)
        for path, own in by_layer(fresh, attached.layers).items():
            attached.layers[path].begin_again(own)
        return
    if not attached.keeps_base:
        raise AdapterError(
            f"adapter={attached.method.settings.kind} with these settings begins at a part of the "
            f"base's own weights, so it cannot begin at {directory}. Leave out adapter.start, or "
            "give a run with the same adapter settings"
        )
    adapter = read_peft(directory)
    _drop_copies_of_the_base(attached, adapter)
    for pairs in (adapter.layers, adapter.embeddings):
        pairs.update({path: _without_padding(pair) for path, pair in pairs.items()})
    _check_places(attached, adapter)
    for path, factors in adapter.layers.items():
        attached.layers[path].begin_from(factors)
    for path, factors in adapter.embeddings.items():
        embedding = attached.embeddings[path]
        with torch.no_grad():
            embedding.a[: factors.rank] = factors.down
            embedding.b[:, : factors.rank] = factors.up / embedding.scale
    parameters = attached.parameters()
    with torch.no_grad():
        for name, tensor in adapter.whole.items():
            path = name.rpartition(".")[0]
            value = tensor.T if _is_transposed(attached, path, tensor) else tensor
            if value.shape != parameters[name].shape:
                raise AdapterError(
                    f"{name} has shape {tuple(value.shape)} in {directory} and "
                    f"{tuple(parameters[name].shape)} here. It was trained on another base model"
                )
            parameters[name].copy_(value)


def _drop_copies_of_the_base(attached: Attached, adapter: PeftAdapter) -> None:
    """PEFT saves the base's own head or embedding beside its LoRA: `X.base_layer.weight`.

    Raises:
        AdapterError: if that is not the weight of this base.
    """
    bases = {p: layer.base for p, layer in (attached.layers | attached.embeddings).items()}
    for name in [name for name in adapter.whole if name.endswith(_COPY)]:
        path = name.removesuffix(_COPY)
        if path not in bases:
            continue  # `_check_places` tells of it
        copy, weight = adapter.whole.pop(name), bases[path].original()
        if weight is None or weight.shape != copy.shape or not _is_near(weight, copy):
            raise AdapterError(
                f"{adapter.directory} holds another weight for {path} than this base has: it was "
                "resized, or trained on another base model. Merge it with PEFT and use the merged "
                "model as the base"
            )


def _is_near(weight: Tensor, copy: Tensor) -> bool:
    """The same but for the dtype that it was saved in."""
    return torch.allclose(weight.float(), copy, rtol=1e-2, atol=1e-3)


def _without_padding(pair: Factors) -> Factors:
    """Without the zeros that make all pairs of a file equally long: a component whose factors are
    both zero has no gradient, and would never learn."""
    used = pair.down.any(dim=1) & pair.up.any(dim=0)
    return Factors(pair.down[used], pair.up[:, used])


def saved_start(directory: Path, settings: AdapterSettings) -> dict[str, Tensor] | None:
    """Our own state of an adapter to begin from, where it fits these settings as it is."""
    if not (directory / NATIVE).is_file():
        return None
    return read_native(directory) if _was_trained_with(directory, settings) else None


def _was_trained_with(directory: Path, settings: AdapterSettings) -> bool:
    """Our own state fits when everything is the same but how it is trained."""
    recorded = json.loads((directory / SIDECAR).read_text(encoding="utf-8"))["adapter"]
    now = settings.model_dump(mode="json")
    return all(
        recorded.get(name) == value for name, value in now.items() if name not in FREE_TO_CHANGE
    )


def _check_places(attached: Attached, adapter: PeftAdapter) -> None:
    """Every tensor of the adapter is used exactly once, or the command fails."""
    known = set(attached.layers) | set(attached.embeddings)
    lost = [path for path in (*adapter.layers, *adapter.embeddings) if path not in known]
    lost += [name for name in adapter.whole if name not in attached.parameters()]
    if lost:
        raise AdapterError(
            f"{adapter.directory} holds {len(lost)} tensors that this recipe does not train "
            f"(such as {lost[0]}). Widen adapter.targets, or set adapter.train_modules, "
            "adapter.train_norms or adapter.embedding_rank as the adapter had them"
        )
    for path, factors in adapter.layers.items():
        base = attached.layers[path].base
        _check_shape(path, factors, (base.d_in, base.d_out))
    for path, factors in adapter.embeddings.items():
        vocabulary, hidden = attached.embeddings[path].base.weight.shape
        _check_shape(path, factors, (vocabulary, hidden))
        if factors.rank > attached.embeddings[path].a.shape[0]:
            raise AdapterError(
                f"the adapter to start from has embedding rank {factors.rank}. "
                f"Set adapter.embedding_rank={factors.rank}"
            )


def _check_shape(path: str, factors: Factors, shape: tuple[int, int]) -> None:
    got = (factors.down.shape[1], factors.up.shape[0])
    if got != shape:
        raise AdapterError(
            f"{path}: the adapter maps {got[0]} to {got[1]} features, the base {shape[0]} to "
            f"{shape[1]}. It was trained on another base model"
        )


def read_native(directory: Path) -> dict[str, Tensor]:
    """Our own state of a run's `adapter/`.

    Raises:
        AdapterError: if the file is damaged or missing.
    """
    try:
        return load_file(directory / NATIVE)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{directory / NATIVE} cannot be read ({error}). Restore it, or delete {directory} and "
            "train the run again: it goes on from its last checkpoint"
        ) from error
