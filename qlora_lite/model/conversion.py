"""Where each stored tensor goes in the model, by the rules with which transformers loads it.

    conversion = conversion_of(model)
    conversion.places(checkpoint)["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
    # Place("model.layers.0.mlp.experts.gate_up_proj", Part(expert=3, start=0, stop=14336))

Most tensors only have another name (GPT-NeoX stores its head as `embed_out`). The experts of a
mixture are stored one by one and are one parameter of the model: each tensor is a part of it, and
is copied to its place when it is read. transformers' own conversion would first hold all experts of
a layer twice (3.8 GB for Mixtral in bf16).
"""

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.checkpoint import Checkpoint

_FILLED = (
    ((MergeModulelist, 0), (Concatenate, 1)),
    ((MergeModulelist, 0),),
    ((Concatenate, 0),),
)
"""The conversions, each an operation and its dimension, whose result can be filled part by part."""


@dataclass(frozen=True)
class Part:
    """Rows of a parameter that one stored tensor fills."""

    expert: int | None
    """Index along the first dimension; None if the parameter has no dimension for experts."""
    start: int
    stop: int

    def of(self, parameter: Tensor) -> Tensor:
        """The view of the parameter that the stored tensor fills."""
        matrix = parameter if self.expert is None else parameter[self.expert]
        return matrix[self.start : self.stop]


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes: a parameter or buffer, or a part of one."""

    name: str
    part: Part | None = None


class Conversion:
    """The rules of one model class."""

    def __init__(self, transforms: Collection[Any], prefix: str, names: Collection[str]) -> None:
        self._transforms = transforms
        self._prefix = prefix
        self._names: dict[str, bool] = dict.fromkeys(names, True)

    def require_supported(self) -> None:
        """Check the layout of the files that transformers writes, without reading any.

        Raises:
            BaseModelError: if a parameter is made of stored ones in a way that is not supported.
        """
        for converter in self._transforms:
            if isinstance(converter, WeightConverter):
                target, stored = converter.target_patterns[0], converter.source_patterns[0]
                if any(target in name for name in self._names):
                    _require_fillable(target, stored, converter)

    def rename(self, stored: Collection[str]) -> "Renamed":
        """The name in the model of each stored tensor.

        Raises:
            BaseModelError: if a parameter is made of stored ones in another way than by merging
                experts and concatenating rows.
        """
        transforms = copy.deepcopy(self._transforms)  # they remember what they renamed
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        names: dict[str, str] = {}
        groups: dict[str, _Group] = {}
        for name in sorted(stored, key=dot_natural_key):
            ours, pattern = rename_source_key(
                name, renamings, converters, self._prefix, self._names
            )
            names[name] = ours
            if pattern is not None and ours in self._names:
                _require_fillable(ours, name, by_pattern[pattern])
                group = groups.setdefault(ours, _Group(by_pattern[pattern], defaultdict(list)))
                group.stored[pattern].append(name)
        return Renamed({name: names[name] for name in stored}, groups)


def conversion_of(model: Any) -> Conversion:
    """The rules of a model, which may be on the meta device."""
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return Conversion(get_model_conversion_mapping(model), str(model.base_model_prefix), names)


@dataclass(frozen=True)
class _Group:
    """The stored tensors that one parameter is made of, in the order of their numbers."""

    converter: Any
    stored: dict[str, list[str]]
    """By pattern of the converter."""


@dataclass(frozen=True)
class Renamed:
    """Stored tensors under the names of the model."""

    names: Mapping[str, str]
    """For every stored tensor the name that the rules give it, whether the model has it or not."""
    groups: Mapping[str, _Group]
    """For each parameter that several tensors are merged into: these."""

    @cached_property
    def pieces(self) -> frozenset[str]:
        """Stored tensors that are a part of a parameter."""
        groups = self.groups.values()
        return frozenset(name for g in groups for names in g.stored.values() for name in names)

    def parts(
        self, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Part]:
        """The place of every piece.

        Args:
            shapes: of the model's parameters.

        Raises:
            BaseModelError: if a parameter is not filled exactly.
        """
        found: dict[str, Part] = {}
        for ours, group in self.groups.items():
            own = _parts(ours, group, checkpoint)
            _require_filled(ours, own, checkpoint, shapes[ours])
            found |= own
        return found


def _require_fillable(ours: str, stored: str, converter: Any) -> None:
    operations = tuple((type(op), getattr(op, "dim", None)) for op in converter.operations)
    if operations not in _FILLED or len(converter.target_patterns) > 1:
        names = ", ".join(kind.__name__ for kind, _ in operations)
        raise BaseModelError(
            f"the checkpoint stores {ours} in another layout ({stored}, which transformers "
            f"converts with {names}), which is not supported: only experts that are stored one by "
            "one and matrices that are concatenated are. Use a model of another family"
        )


def _parts(ours: str, group: _Group, checkpoint: Checkpoint) -> dict[str, Part]:
    is_stacked = isinstance(group.converter.operations[0], MergeModulelist)
    parts, start = {}, 0
    for pattern in group.converter.source_patterns:
        rows = 0
        for index, name in enumerate(group.stored.get(pattern, [])):
            rows = (*checkpoint.info(name).shape, 1)[0]  # a scalar is refused by _require_filled
            parts[name] = Part(index if is_stacked else None, start, start + rows)
            start += 0 if is_stacked else rows
        start += rows if is_stacked else 0
    return parts


def _require_filled(
    ours: str, parts: Mapping[str, Part], checkpoint: Checkpoint, shape: tuple[int, ...]
) -> None:
    """Check that the parts have the right shapes and are as many numbers as the parameter has."""
    parameter, filled = torch.empty(shape, device="meta"), 0
    for name, part in parts.items():
        stored = checkpoint.info(name).shape
        fits = part.expert is None or part.expert < shape[0]
        if not fits or tuple(part.of(parameter).shape) != stored:
            raise BaseModelError(
                f"{name} has shape {stored} and does not fit into {ours}, which has {shape} "
                "according to config.json. They belong to different models: download both again"
            )
        filled += torch.Size(stored).numel()
    if filled != parameter.numel():
        raise BaseModelError(
            f"the checkpoint has {filled:,} of the {parameter.numel():,} numbers of {ours}: it has "
            f"{len(parts)} parts of it, and some are missing. It is incomplete, or its config.json "
            "belongs to another model: download it again"
        )
