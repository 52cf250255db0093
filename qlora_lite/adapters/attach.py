"""Put a method's layers into a frozen model, and know afterwards what is trained.

    attached = attach(model, method, plan, seed, dtype)

The layers that are adapted are replaced in place; the model's own code runs on, unaware.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlora_lite.adapters.embedding import LoRAEmbedding
from qlora_lite.adapters.layer import AdapterLayer, Role
from qlora_lite.adapters.method import Method, ParameterGroup, Requirement
from qlora_lite.adapters.plan import AdapterPlan
from qlora_lite.adapters.ranks import scale_of
from qlora_lite.adapters.split_state import SplitState, by_layer
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.seeds import generator
from qlora_lite.model.frozen import FrozenEmbedding, FrozenLinear
from qlora_lite.model.targets import LinearSpec

ALWAYS_FP32 = (Role.GATE, Role.MAGNITUDE)
"""Roles whose updates, or whose start, would be lost in bf16."""


class TrainedLinear(nn.Module):
    """A linear layer trained whole: the dense base weight as an fp32 parameter."""

    def __init__(self, base: FrozenLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.dense().float())
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().float().clone())

    def matmul(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = self.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class TrainedEmbedding(nn.Module):
    """An embedding trained whole, as an fp32 parameter."""

    def __init__(self, base: FrozenEmbedding) -> None:
        super().__init__()
        self.compute = base.compute
        self.scaled = base.scaled
        self.weight = nn.Parameter(base.dense().float())

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(nn.functional.embedding(ids, self.weight).to(self.compute))


@dataclass
class AttachedAdapter:
    """What is trained in a model."""

    model: nn.Module
    method: Method
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    embeddings: dict[str, LoRAEmbedding] = field(default_factory=dict)
    full_modules: dict[str, nn.Module] = field(default_factory=dict)
    """Norms and modules that are fully trained, by path."""
    frozen_modules: dict[str, nn.Module] = field(default_factory=dict)
    """The frozen modules that they replace."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by `path.name`, in the model's order."""
        found: dict[str, nn.Parameter] = {}
        for path, layer in (self.layers | self.embeddings).items():
            found |= {f"{path}.{name}": p for name, p in layer.trained().items()}
        for path, module in self.full_modules.items():
            found |= {f"{path}.{name}": p for name, p in module.named_parameters()}
        return found

    def groups(self) -> list[ParameterGroup]:
        """The method's groups, then what is trained beside the adapters (without decay)."""
        groups = self.method.groups()
        known = {name for group in groups for name in group.names}
        rest = {name: p for name, p in self.parameters().items() if name not in known}
        if rest:
            groups.append(ParameterGroup(tuple(rest), tuple(rest.values()), decays=False))
        return groups

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters().values())

    def state(self) -> dict[str, Tensor]:
        """All that makes the adapter, by `path.name`: what checkpoints and its files hold."""
        found = {name: p.detach() for name, p in self.parameters().items()}
        for path, layer in self.layers.items():
            found |= {f"{path}.{name}": tensor for name, tensor in layer.state().items()}
        return found

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse of `state`; names must match exactly.

        Raises:
            AdapterError: if a tensor is missing, left over, or a parameter has another shape.
        """
        expected = self.state()
        if odd := sorted(saved.keys() ^ expected.keys()):
            raise AdapterError(
                f"the saved adapter and this recipe differ in {len(odd)} tensors (such as "
                f"{odd[0]}). Use the recipe.json of the run that wrote it"
            )
        for name, parameter in self.parameters().items():
            if parameter.shape != saved[name].shape:
                raise AdapterError(
                    f"{name} has shape {tuple(saved[name].shape)} in the saved adapter and "
                    f"{tuple(parameter.shape)} here. Use the recipe.json of the run that wrote it"
                )
            parameter.data.copy_(saved[name])
        for path, tensors in by_layer(saved, self.layers).items():
            self.layers[path].load_state(tensors)

    def train(self, mode: bool = True) -> None:
        """Adapter dropout on or off. The frozen base is never in training mode: its own dropout,
        where it has one, would make the adapted model start elsewhere than at the base."""
        for layer in self.layers.values():
            layer.train(mode)

    @property
    def is_base_unchanged(self) -> bool:
        """Without the adapter this is the model that the base's checkpoint makes."""
        return Requirement.ORIGINAL_WEIGHTS not in self.method.requires

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare base, while the block runs. Of a method that needs the original weights it is
        what that method left of the base (`is_base_unchanged` is false)."""
        switched: list[AdapterLayer | LoRAEmbedding]
        switched = [*self.layers.values(), *self.embeddings.values()]
        for layer in switched:
            layer.enabled = False
        for path, module in self.frozen_modules.items():
            replace(self.model, path, module)
        try:
            yield
        finally:
            for layer in switched:
                layer.enabled = True
            for path, module in self.full_modules.items():
                replace(self.model, path, module)


def attach(
    model: nn.Module,
    method: Method,
    plan: AdapterPlan,
    seed: int,
    dtype: torch.dtype,
    split_state: SplitState | None = None,
) -> AttachedAdapter:
    """Build the layers of `method` on `model`, in place.

    Args:
        plan: what to train, from `plan_adapter`.
        seed: every layer draws from its own stream, seeded by its path.
        dtype: storage dtype of the trained parameters; gates and full modules are fp32.
        split_state: what `Method.split` found while the base was loaded, and the saved state.

    Raises:
        AdapterError: if the input embedding gets a LoRA and is not a plain embedding.
    """
    attached = AttachedAdapter(model, method)
    split_state = split_state or SplitState(method, plan.specs, seed)
    for spec in plan.specs:
        base = model.get_submodule(spec.path)
        assert isinstance(base, FrozenLinear), spec.path
        layer = build_layer(base, spec, split_state, dtype)
        replace(model, spec.path, layer)
        attached.layers[spec.path] = layer
    method.set_layers(attached.layers)
    if plan.embedding is not None:
        _attach_embedding(model, attached, plan.embedding, seed, dtype)
    _attach_full_modules(model, attached, plan.full_modules)
    return attached


def build_layer(
    base: FrozenLinear, spec: LinearSpec, split_state: SplitState, dtype: torch.dtype
) -> AdapterLayer:
    """One planned layer at its start, on its base's device, at rest in `dtype`.

    Rows lie one after the other, as in a file: another order in memory would be another order of
    sums, and a run that was resumed would differ in its last bits.
    """
    draws = generator(split_state.seed, "adapter", spec.path)
    layer = split_state.method.build(base, spec, split_state.build_state(spec.path), draws)
    own = layer.state().keys()  # a tensor that is also a parameter or buffer is kept once
    layer.start = {n: t for n, t in split_state.start_of(spec.path).items() if n not in own}
    device = base.weight.device
    for name, parameter in layer.trained().items():
        rests_in = torch.float32 if layer.roles[name] in ALWAYS_FP32 else dtype
        parameter.data = parameter.data.to(device, rests_in).contiguous()
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            rests_in = dtype if name in layer.frozen else buffer.dtype
            layer._buffers[name] = buffer.to(device, rests_in).contiguous()
    return layer


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _attach_embedding(
    model: nn.Module, attached: AttachedAdapter, path: str, seed: int, dtype: torch.dtype
) -> None:
    settings = attached.method.settings
    base = model.get_submodule(path)
    if not isinstance(base, FrozenEmbedding):
        raise AdapterError(
            f"adapter.embedding_rank={settings.embedding_rank}: {path} is a "
            f"{type(base).__name__}, not a plain embedding. Set embedding_rank=0"
        )
    scale = scale_of(settings.alpha, settings.embedding_rank, settings.scaling)
    stream = generator(seed, "adapter", path)
    layer = LoRAEmbedding.at_start(base, settings.embedding_rank, scale, stream)
    layer.to(base.weight.device)
    for parameter in layer.trained().values():
        parameter.data = parameter.data.to(dtype)
    replace(model, path, layer)
    attached.embeddings[path] = layer


def _attach_full_modules(model: nn.Module, attached: AttachedAdapter, paths: Sequence[str]) -> None:
    for path in paths:
        module = model.get_submodule(path)
        attached.frozen_modules[path] = module
        attached.full_modules[path] = _trainable_copy(module).requires_grad_(True)
        replace(model, path, attached.full_modules[path])


def _trainable_copy(module: nn.Module) -> nn.Module:
    if isinstance(module, FrozenLinear):
        return TrainedLinear(module)
    if isinstance(module, FrozenEmbedding):
        return TrainedEmbedding(module)
    return copy.deepcopy(module)
