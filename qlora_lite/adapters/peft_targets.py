"""Do the layers that an `adapter_config.json` names have the tensors that its file has?

A configuration that was edited, or copied from another adapter, would be read as if it were right:
the tensors alone decide what is loaded. PEFT reads both, and leaves out tensors of layers that the
configuration does not name.
"""

import re
from collections.abc import Collection
from pathlib import Path

import regex

from qlora_lite.adapters.peft_config import CONFIG, MATCH_SECONDS, PeftConfig
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.json_files import shown

ALL_LINEAR = "all-linear"


def require_named_layers(
    directory: Path, config: PeftConfig, paths: Collection[str], modules: Collection[str]
) -> None:
    """Check that the configuration names all layers of the file, and that the file has its modules.

    Args:
        paths: of the layers with pairs.
        modules: names of the other tensors.

    Raises:
        AdapterError: naming the field and a layer.
    """
    if config.task_type not in (None, "CAUSAL_LM"):
        _refuse(directory, "task_type", config.task_type, "CAUSAL_LM is needed")
    for path in paths:
        if config.target_modules is not None and not _names(config.target_modules, path):
            _refuse(directory, "target_modules", config.target_modules, f"the file has {path}")
        if config.exclude_modules is not None and _names(config.exclude_modules, path):
            _refuse(directory, "exclude_modules", config.exclude_modules, f"the file has {path}")
        if config.layers_to_transform is not None and not _is_in(config.layers_to_transform, path):
            value = config.layers_to_transform
            _refuse(directory, "layers_to_transform", value, f"the file has {path}")
    for name in config.modules_to_save or []:
        if not any(f".{name}." in f".{tensor}" for tensor in modules):
            _refuse(directory, "modules_to_save", config.modules_to_save, f"the file has no {name}")


def _names(targets: str | list[str], path: str) -> bool:
    """PEFT's rule: a text is a pattern of the whole path, names of a list are ends of it."""
    if targets == ALL_LINEAR:
        return True
    if isinstance(targets, list):
        return any(path == name or path.endswith(f".{name}") for name in targets)
    try:
        return regex.fullmatch(targets, path, timeout=MATCH_SECONDS) is not None
    except (regex.error, TimeoutError) as error:
        raise AdapterError(
            f"the pattern {shown(targets)} of {CONFIG} cannot be used ({error}). Replace it by the "
            "names of its layers"
        ) from None


def _is_in(layers: int | list[int], path: str) -> bool:
    number = re.search(r"\.(\d+)\.", path)
    return number is None or int(number[1]) in (layers if isinstance(layers, list) else [layers])


def _refuse(directory: Path, field: str, value: object, problem: str) -> None:
    raise AdapterError(
        f"{directory / CONFIG} has {field}={shown(value)}, but {problem}. Copy the adapter again, "
        "with the configuration that belongs to it"
    )
