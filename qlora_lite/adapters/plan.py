"""What will be trained in a base, decided before a weight is read.

    plan = plan_adapter(method, facts)
    plan.layers["model.layers.0.mlp.up_proj"].rank

The memory plan, the checks, loading, attaching and merging all use this one value.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qlora_lite.adapters.method import Method, Requirement
from qlora_lite.adapters.ranks import LayerPlan, check_ranks
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.facts import BaseFacts
from qlora_lite.model.shape import ModelShape
from qlora_lite.model.targets import LinearSpec, select

TRAINABLE = ("linear", "head", "embedding", "norm")
"""Roles of the parameters of a module that can be fully trained."""


@dataclass(frozen=True)
class AdapterPlan:
    """The adapted layers with their ranks, and the modules that are fully trained."""

    specs: tuple[LinearSpec, ...]
    """The adapted linear layers, in the model's order."""

    layers: Mapping[str, LayerPlan]
    """Rank and scale of each of them, by path."""

    embedding: str | None = None
    """Path of the input embedding if it gets a LoRA."""

    full_modules: tuple[str, ...] = ()
    """Paths of the modules that are fully trained: `train_modules`, then the norms."""


def plan_adapter(method: Method, facts: BaseFacts) -> AdapterPlan:
    """What `method` trains in this base: the targets, less what has rank 0 or is fully trained.

    Raises:
        AdapterError: if the targets, a rank pattern or a module name match nothing, no layer is
            left, or the method cannot adapt one of them.
    """
    settings = method.settings
    full_modules = match_modules(facts.shape, settings.train_modules)
    layers = plan_layers(method, facts.specs, full_modules)
    embedding = facts.shape.embedding if settings.embedding_rank else None
    if embedding in full_modules:
        raise AdapterError(
            f"adapter.embedding_rank={settings.embedding_rank} and adapter.train_modules both "
            f"train {embedding}. Set only one of them"
        )
    norms = [p.module for p in facts.shape.parameters if p.role == "norm"]
    full_modules += norms if settings.train_norms else []
    return replace(layers, embedding=embedding, full_modules=tuple(dict.fromkeys(full_modules)))


def plan_layers(
    method: Method, specs: Sequence[LinearSpec], full_modules: Sequence[str] = ()
) -> AdapterPlan:
    """The plan of the linear layers alone.

    Raises:
        AdapterError: as `plan_adapter`.
    """
    settings = method.settings
    if not settings.targets:
        raise AdapterError(
            "adapter.targets is empty, so nothing would be trained. Use all-linear, attention, "
            "mlp, or a list of names"
        )
    targets = [s for s in select(specs, settings.targets) if s.path not in full_modules]
    check_ranks(targets, settings.ranks)
    layers = method.plan(targets)
    planned = tuple(s for s in targets if s.path in layers)
    if not planned:
        raise AdapterError(
            f"adapter.ranks={settings.ranks} gives every target rank 0, so nothing would be "
            "trained. Give some layers a rank of 1 or more"
        )
    heads = [s.path for s in planned if s.kind == "head"]
    if heads and Requirement.ORIGINAL_WEIGHTS in method.requires:
        raise AdapterError(
            f"adapter={settings.kind} with these settings starts before the base is quantised, and "
            f"the head ({heads[0]}) is not quantised like the other layers. Remove it from "
            "adapter.targets"
        )
    return AdapterPlan(planned, layers)


def match_modules(shape: ModelShape, names: Iterable[str]) -> list[str]:
    """Paths of the modules that `names` selects: by path, last name or glob.

    Raises:
        AdapterError: if a name matches no module that can be fully trained.
    """
    modules = list(dict.fromkeys(p.module for p in shape.parameters if p.role in TRAINABLE))
    found: list[str] = []
    for name in names:
        matches = [p for p in modules if fnmatch.fnmatch(p, name) or p.rpartition(".")[2] == name]
        if not matches:
            known = sorted({p.rpartition(".")[2] for p in modules})
            raise AdapterError(
                f"adapter.train_modules: {name!r} matches no module. There are "
                f"{', '.join(known)}; paths and globs work too"
            )
        found += [m for m in matches if m not in found]
    return found
