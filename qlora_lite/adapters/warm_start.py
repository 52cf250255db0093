"""Start from an existing adapter (`adapter.start=PATH`): our own state, or PEFT's pairs.

If method and settings are the same, all tensors of the adapter are loaded. Otherwise its PEFT form
is read, and the method of the recipe starts from those pairs.
"""

from pathlib import Path

import torch
from pydantic import ConfigDict
from torch import Tensor

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.files import NATIVE, SIDECAR, read_native
from qlora_lite.adapters.layer import Factors, Role
from qlora_lite.adapters.method import AdapterSettings
from qlora_lite.adapters.peft import WEIGHTS, PeftAdapter, is_transposed, read_peft
from qlora_lite.adapters.peft_config import CONFIG, read_peft_config
from qlora_lite.adapters.split_state import by_layer
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.json_files import JsonFile, check_as
from qlora_lite.foundation.sealed import read_sealed

FREE_TO_CHANGE = ("start", "dropout", "dtype", "lr_ratio")
"""Settings that may differ from those of an adapter whose native state is loaded."""

_COPY = ".base_layer.weight"


class _Kind(JsonFile):
    model_config = ConfigDict(extra="allow")

    kind: str


class _OwnSettings(JsonFile):
    """What is read here of `qlora_lite.json`."""

    adapter: _Kind


def require_adapter(directory: Path) -> None:
    """Check that the directory contains an adapter, before anything large is read.

    Raises:
        AdapterError: if it contains no adapter.
    """
    has_peft = (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()
    if not has_peft and not (directory / NATIVE).is_file():
        raise AdapterError(
            f"{directory} is not an adapter directory: it must contain {CONFIG} and {WEIGHTS}. "
            "Give the folder that PEFT's save_pretrained wrote, or a run's adapter/"
        )


def describe_warm_start(directory: Path, settings: AdapterSettings, base: str) -> list[str]:
    """Notes: which file the run starts from, and whether that adapter was made for another base."""
    is_own = (directory / NATIVE).is_file() and _was_trained_with(directory, settings)
    notes = [f"starting from {directory / (NATIVE if is_own else WEIGHTS)}"]
    if (directory / CONFIG).is_file():
        named = read_peft_config(directory).base_model_name_or_path
        if named and Path(named).name != Path(base).name:
            notes.append(f"{directory} was made for the base {named}, and this run's is {base}")
    return notes


def warm_start(attached: AttachedAdapter, directory: Path) -> None:
    """Start from an existing adapter: our own state of the same method, or PEFT factors.

    Raises:
        AdapterError: if a tensor of the adapter is not trained here, or has another shape.
    """
    require_adapter(directory)
    saved = saved_state(directory, attached.method.settings)
    if saved is not None:
        fresh = {name: tensor.clone() for name, tensor in attached.state().items()}
        attached.load_state(saved)
        for path, own in by_layer(fresh, attached.layers).items():
            attached.layers[path].restart_chain(own)
        return
    if not attached.is_base_unchanged:
        raise AdapterError(
            f"adapter={attached.method.settings.kind} with these settings starts from a part of "
            f"the base weights, so it cannot start from {directory}. Leave out adapter.start, or "
            "give a run with the same adapter settings"
        )
    if not (directory / CONFIG).is_file():
        raise AdapterError(
            f"{directory} has no PEFT form ({CONFIG}), so only a recipe with the same method and "
            "settings can start from it. Merge its run and use the merged model as base.model, or "
            "use the adapter settings of its recipe.json"
        )
    adapter = read_peft(directory)
    _drop_base_weights(attached, adapter)
    for pairs in (adapter.layers, adapter.embeddings):
        pairs.update({path: _without_padding(pair) for path, pair in pairs.items()})
    _check_all_used(attached, adapter)
    for path, factors in adapter.layers.items():
        attached.layers[path].warm_start(factors)
    with torch.no_grad():
        for path, factors in adapter.embeddings.items():
            embedding = attached.embeddings[path]
            embedding.a[: factors.rank] = factors.down
            embedding.b[:, : factors.rank] = factors.up / embedding.scale
        _copy_full_modules(attached, adapter)


def _copy_full_modules(attached: AttachedAdapter, adapter: PeftAdapter) -> None:
    parameters = attached.parameters()
    for name, tensor in adapter.full_tensors.items():
        path = name.rpartition(".")[0]
        value = tensor.T if is_transposed(attached, path, tensor) else tensor
        if value.shape != parameters[name].shape:
            raise AdapterError(
                f"{name} has shape {tuple(value.shape)} in {adapter.directory} and "
                f"{tuple(parameters[name].shape)} here. It was trained on another base model"
            )
        parameters[name].copy_(value)


def _drop_base_weights(attached: AttachedAdapter, adapter: PeftAdapter) -> None:
    """Drop the head or embedding of the base that PEFT saves with a LoRA: `X.base_layer.weight`.

    Raises:
        AdapterError: if it differs from the weight of this base.
    """
    bases = {p: layer.base for p, layer in (attached.layers | attached.embeddings).items()}
    for name in [name for name in adapter.full_tensors if name.endswith(_COPY)]:
        path = name.removesuffix(_COPY)
        if path not in bases:
            continue  # `_check_all_used` raises
        copy, weight = adapter.full_tensors.pop(name), bases[path].original()
        if weight is None or weight.shape != copy.shape or not _is_near(weight, copy):
            raise AdapterError(
                f"{adapter.directory} contains another weight for {path} than this base: it was "
                "resized, or trained on another base model. Merge it with PEFT and use the merged "
                "model as the base"
            )


def _is_near(weight: Tensor, copy: Tensor) -> bool:
    """Whether two weights are equal up to the rounding of the dtype that one was saved in."""
    return torch.allclose(weight.float(), copy, rtol=1e-2, atol=1e-3)


def _without_padding(pair: Factors) -> Factors:
    """Remove the zeros that pad the pairs of a file to one rank: a component whose factors are both
    zero has no gradient and would never learn."""
    used = pair.down.any(dim=1) & pair.up.any(dim=0)
    return Factors(pair.down[used], pair.up[:, used], magnitude=pair.magnitude)


def saved_state(directory: Path, settings: AdapterSettings) -> dict[str, Tensor] | None:
    """The native state of an adapter if it was trained with these settings, else None."""
    if not (directory / NATIVE).is_file():
        return None
    return read_native(directory) if _was_trained_with(directory, settings) else None


def _was_trained_with(directory: Path, settings: AdapterSettings) -> bool:
    """Whether all settings but `FREE_TO_CHANGE` are those of the saved adapter."""
    try:
        recorded = check_as(read_sealed(directory / SIDECAR), _OwnSettings).adapter.model_dump()
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{directory / SIDECAR} cannot be read ({error}), so the settings of {NATIVE} are "
            "unknown. Copy the adapter again"
        ) from error
    now = settings.model_dump(mode="json")
    return all(
        recorded.get(name) == value for name, value in now.items() if name not in FREE_TO_CHANGE
    )


def _check_all_used(attached: AttachedAdapter, adapter: PeftAdapter) -> None:
    """Check that this recipe trains every tensor of the adapter, with the same shapes."""
    adapted = set(attached.layers) | set(attached.embeddings)
    unused = [path for path in (*adapter.layers, *adapter.embeddings) if path not in adapted]
    unused += [name for name in adapter.full_tensors if name not in attached.parameters()]
    if unused:
        raise AdapterError(
            f"{adapter.directory} contains {len(unused)} tensors that this recipe does not train "
            f"(such as {unused[0]}). Add them to adapter.targets, or set adapter.train_modules, "
            "adapter.train_norms or adapter.embedding_rank as in the adapter"
        )
    for path, factors in adapter.layers.items():
        layer = attached.layers[path]
        _check_shape(path, factors, (layer.base.d_in, layer.base.d_out))
        if factors.magnitude is not None and Role.MAGNITUDE not in layer.roles.values():
            raise AdapterError(
                f"{adapter.directory} is a DoRA, and adapter={attached.method.settings.kind} has "
                "no magnitudes. Use adapter=dora"
            )
    for path, factors in adapter.embeddings.items():
        base = attached.embeddings[path].base
        _check_shape(path, factors, (base.num_embeddings, base.embedding_dim))
        if factors.rank > attached.embeddings[path].a.shape[0]:
            raise AdapterError(
                f"the adapter to start from has embedding rank {factors.rank}, and this recipe a "
                f"smaller one. Set adapter.embedding_rank={factors.rank}"
            )


def _check_shape(path: str, factors: Factors, shape: tuple[int, int]) -> None:
    got = (factors.down.shape[1], factors.up.shape[0])
    if got != shape:
        raise AdapterError(
            f"{path}: the adapter maps {got[0]} to {got[1]} features, the base {shape[0]} to "
            f"{shape[1]}. It was trained on another base model"
        )
