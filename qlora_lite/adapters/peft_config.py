"""`adapter_config.json` of PEFT: which fields we understand, and how pairs are scaled.

`FIELDS` lists every field of PEFT's LoraConfig with its default (a test compares it with the
installed PEFT). Fields that change what an adapter computes, and that we do not apply, must have
their default: an aLoRA or a BD-LoRA is not a plain LoRA. A field that is not in the list must be
empty.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import regex
from pydantic import ConfigDict, Field

from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.json_files import JsonFile, Malformed, read_as, shown

CONFIG = "adapter_config.json"

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that change the base weights, as prefixes of their names."""
KEEPS_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal")
"""Those that only set the start of the pairs."""

FIELDS: dict[str, Any] = {
    # applied here
    "peft_type": None,
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "init_lora_weights": True,
    # what the adapter is for, and which layers it has: its tensors show that
    "task_type": None,
    "auto_mapping": None,
    "peft_version": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    # only used in training, or to start it
    "lora_dropout": 0.0,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "runtime_config": None,
    # no effect on the pairs: the layout of the base, which PEFT takes from the class of the layer
    # whatever the config says, and settings of features that are off
    "fan_in_fan_out": False,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    # change what is computed
    "megatron_config": None,
    "trainable_token_indices": None,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}
"""Every field of PEFT's LoraConfig and its default."""

_NOT_APPLIED = tuple(FIELDS)[tuple(FIELDS).index("megatron_config") :]
"""Fields that must have their default."""

MAX_PATTERN = 500
"""Characters of a pattern: PEFT's own are names of layers."""
MATCH_SECONDS = 1.0

Positive = Annotated[int, Field(ge=1, le=2**20)]
Alpha = Annotated[float, Field(gt=0, le=1e9)]


class _Kind(JsonFile):
    peft_type: str


class PeftConfig(JsonFile):
    """The fields of `adapter_config.json` that we use."""

    model_config = ConfigDict(extra="allow")

    peft_type: str
    r: Positive
    lora_alpha: Alpha
    use_rslora: bool | None = False
    use_dora: bool | None = False
    rank_pattern: dict[str, Positive] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    bias: str | None = "none"
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool | None = False

    def rank(self, path: str) -> int:
        """The rank of the pair at `path`, by PEFT's rule."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def scale(self, path: str) -> float:
        """The scale of the pair at `path`: alpha / r, or alpha / sqrt(r)."""
        alpha = _by_pattern(self.alpha_pattern, path, self.lora_alpha)
        rank = self.rank(path)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_peft_config(directory: Path) -> PeftConfig:
    """Read `adapter_config.json`.

    Raises:
        AdapterError: if it is damaged, or of another kind of adapter.
    """
    try:
        kind = read_as(directory / CONFIG, _Kind).peft_type
        if kind == "LORA":
            return read_as(directory / CONFIG, PeftConfig)
    except Malformed as error:
        raise AdapterError(
            f"{directory / CONFIG} is damaged ({error}). Copy the adapter again"
        ) from None
    raise AdapterError(
        f"{directory / CONFIG} has peft_type={shown(kind)}, and LORA is needed. "
        "Merge it with PEFT and use the merged model as the base"
    )


def require_plain_lora(directory: Path, config: PeftConfig) -> None:
    """Check that the adapter is a LoRA or DoRA whose pairs are all there is to it.

    Raises:
        AdapterError: naming the field that is not understood.
    """
    if config.bias not in ("none", None):
        raise AdapterError(
            f"{directory} has bias={config.bias!r}, and only adapters without trained "
            "biases can be read. Merge it with PEFT and use the merged model as the base"
        )
    _require_known_start(directory, str(config.init_lora_weights).lower())
    for name, value in (config.model_extra or {}).items():
        if _is_understood(name, value):
            continue
        raise AdapterError(
            f"{directory / CONFIG} has {name}={shown(value)}, which changes what the adapter "
            "computes or is not known here. Merge it with PEFT and use the merged model as the "
            "base"
        )
    for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
        _compiled(pattern)


def _require_known_start(directory: Path, start: str) -> None:
    if start.startswith(CHANGES_BASE):
        raise AdapterError(
            f"{directory} has init_lora_weights={start!r}, which changed the base weights: the "
            "adapter does not work on the plain base. Save it again with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it with PEFT and use the merged "
            "model as the base"
        )
    if start not in KEEPS_BASE:
        raise AdapterError(
            f"{directory} has init_lora_weights={shown(start)}, and it is not known whether that "
            "changed the base weights. Merge it with PEFT and use the merged model as the base"
        )


def _is_understood(name: str, value: Any) -> bool:
    if name not in FIELDS:
        return not value
    return name not in _NOT_APPLIED or value is None or value == FIELDS[name]


def _by_pattern(values: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `path`, as PEFT looks it up.

    Raises:
        AdapterError: if a pattern is not a regular expression, or takes too long to match.
    """
    for pattern, value in (values or {}).items():
        try:
            if _compiled(pattern).fullmatch(path, timeout=MATCH_SECONDS):
                return value
        except TimeoutError:
            raise AdapterError(
                f"the pattern {shown(pattern)} of {CONFIG} takes more than {MATCH_SECONDS:g} s to "
                f"match {path!r}. Replace it by the names of its layers"
            ) from None
    return default


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> "regex.Pattern[str]":
    try:
        if len(pattern) > MAX_PATTERN:
            raise ValueError(f"it has {len(pattern)} characters, at most {MAX_PATTERN} are allowed")
        return regex.compile(rf"(.*\.)?({pattern})")
    except (regex.error, ValueError, RecursionError, MemoryError) as error:
        raise AdapterError(
            f"the pattern {shown(pattern)} of {CONFIG} cannot be used ({error}). Replace it by the "
            "names of its layers"
        ) from None
