"""The tensors of a saved adapter, sorted by the module that they belong to.

Every tensor must belong to exactly one module and no module may lack one: applying part of an
adapter would give a model that was never trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qlora_lite.adapters.method import Method
from qlora_lite.adapters.plan import AdapterPlan, plan_adapter
from qlora_lite.adapters.split_state import by_layer
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.facts import BaseFacts


@dataclass(frozen=True)
class AdapterParts:
    """An adapter's tensors by module."""

    full_parameters: dict[str, Tensor]
    """Parameters of fully trained modules, by name, in fp32; matrices as (d_out, d_in)."""
    layers: dict[str, dict[str, Tensor]]
    """Tensors of each adapted linear layer, by path."""
    embeddings: dict[str, dict[str, Tensor]]
    """Tensors of an adapted embedding, by path."""
    plan: AdapterPlan
    """What the adapter's settings train in this base."""

    @property
    def changed_modules(self) -> set[str]:
        """Paths of the modules whose weights differ from the base's."""
        owners = {name.rpartition(".")[0] for name in self.full_parameters}
        return {*owners, *self.layers, *self.embeddings}


def sort_by_module(state: Mapping[str, Tensor], method: Method, facts: BaseFacts) -> AdapterParts:
    """The tensors of `native.safetensors`, by what they are in the base.

    Raises:
        AdapterError: naming a tensor that belongs to no module, or that is missing.
    """
    settings = method.settings
    parameters = {p.name for p in facts.shape.parameters}
    full = {name: tensor.float() for name, tensor in state.items() if name in parameters}
    plan = plan_adapter(method, facts)
    _check_full_modules(full, plan, settings.kind, facts)
    rest = {name: tensor for name, tensor in state.items() if name not in full}
    embeddings: dict[str, dict[str, Tensor]] = {}
    if settings.embedding_rank:
        path = facts.shape.embedding
        embeddings[path] = by_layer(rest, [path]).get(path, {})
        if embeddings[path].keys() != {"a", "b"}:
            raise AdapterError(mismatch(f"{path}.a", settings.kind))
    layers = by_layer(rest, plan.layers)
    if missing := plan.layers.keys() - layers.keys():
        raise AdapterError(mismatch(f"{min(missing)}.*", settings.kind))
    placed = {f"{path}.{name}" for path, own in (layers | embeddings).items() for name in own}
    if extra := rest.keys() - placed:
        raise AdapterError(mismatch(min(extra), settings.kind))
    return AdapterParts(full, layers, embeddings, plan)


def _check_full_modules(
    full: Mapping[str, Tensor], plan: AdapterPlan, kind: str, facts: BaseFacts
) -> None:
    """There must be all parameters of the planned modules, no other, in the base's shapes."""
    planned = [p for p in facts.shape.parameters if p.module in plan.full_modules]
    if unmatched := {p.name for p in planned} ^ full.keys():
        raise AdapterError(mismatch(min(unmatched), kind))
    for parameter in planned:
        got, shape = tuple(full[parameter.name].shape), parameter.shape
        expected = shape[::-1] if parameter.transposed else shape
        if got != expected:
            raise AdapterError(
                f"{parameter.name} has shape {got} in the adapter and {expected} in the base. "
                "The adapter was trained on another base model: use that one"
            )


def mismatch(name: str, kind: str) -> str:
    """Error message for a tensor that is extra or missing."""
    return (
        f"the adapter and its settings disagree about {name}: either {kind} with these settings "
        "does not train it on this base, or the adapter has none. Nothing was merged: use the "
        "run's own recipe.json, adapter/ and base"
    )
