"""Replace linear layers of a frozen model by adapter layers, and keep track of what is trained.

    attached = attach(model, method, plan, seed, dtype)

Layers are replaced in place; the model's own code does not change.
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
from qlora_lite.foundation.partitioned import whole
from qlora_lite.foundation.seeds import generator
from qlora_lite.model.frozen import FrozenEmbedding, FrozenLinear
from qlora_lite.model.targets import LinearSpec

ALWAYS_FP32 = (Role.GATE, Role.MAGNITUDE)
"""Roles that are stored in fp32, because bf16 would lose their updates or initial values."""


class TrainedLinear(nn.Module):
    """A fully trained linear layer: the dense base weight as an fp32 parameter."""

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
    """A fully trained embedding, as an fp32 parameter."""

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
    """The frozen modules that `full_modules` replace."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by `path.name`, in the model's order."""
        found: dict[str, nn.Parameter] = {}
        for path, layer in (self.layers | self.embeddings).items():
            found |= {f"{path}.{name}": p for name, p in layer.trained().items()}
        for path, module in self.full_modules.items():
            found |= {f"{path}.{name}": p for name, p in module.named_parameters()}
        return found

    def groups(self) -> list[ParameterGroup]:
        """The method's groups, then one without decay for embeddings and full modules."""
        groups = self.method.groups()
        grouped = {name for group in groups for name in group.names}
        rest = {name: p for name, p in self.parameters().items() if name not in grouped}
        if rest:
            groups.append(ParameterGroup(tuple(rest), tuple(rest.values()), decays=False))
        return groups

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters().values())

    def state(self) -> dict[str, Tensor]:
        """All tensors of the adapter by `path.name`, as saved in checkpoints and its files."""
        found = {name: p.detach() for name, p in self.parameters().items()}
        for path, layer in self.layers.items():
            found |= {f"{path}.{name}": tensor for name, tensor in layer.state().items()}
        return found

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Load what `state` returned; names must match exactly.

        Raises:
            AdapterError: if a tensor is missing or extra, or a parameter has another shape.
        """
        expected = self.state()
        if unmatched := sorted(saved.keys() ^ expected.keys()):
            raise AdapterError(
                f"the saved adapter and this recipe differ in {len(unmatched)} tensors (such as "
                f"{unmatched[0]}). Use the recipe.json of the run that wrote it"
            )
        for name, parameter in self.parameters().items():
            if parameter.shape != saved[name].shape:
                raise AdapterError(
                    f"{name} has shape {tuple(saved[name].shape)} in the saved adapter and "
                    f"{tuple(parameter.shape)} here. Use the recipe.json of the run that wrote it"
                )
            with torch.no_grad():
                parameter.copy_(saved[name])
        for path, tensors in by_layer(saved, self.layers).items():
            self.layers[path].load_state(tensors)

    def train(self, mode: bool = True) -> None:
        """Turn adapter dropout on or off. The base stays in evaluation mode: dropout of its own
        would make the first output differ from the base's."""
        for layer in self.layers.values():
            layer.train(mode)

    @property
    def is_base_unchanged(self) -> bool:
        """Whether the model without the adapter is the base of the checkpoint (as quantised)."""
        return Requirement.ORIGINAL_WEIGHTS not in self.method.requires

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Turn the adapter off while the block runs. If `is_base_unchanged` is false, the remaining
        model is the base as the method changed it."""
        layers: list[AdapterLayer | LoRAEmbedding]
        layers = [*self.layers.values(), *self.embeddings.values()]
        for layer in layers:
            layer.enabled = False
        for path, module in self.frozen_modules.items():
            replace(self.model, path, module)
        try:
            yield
        finally:
            for layer in layers:
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
    """Build the layers of `method` and put them into `model`, in place.

    Args:
        plan: what to train, from `plan_adapter`.
        seed: every layer draws from its own stream, seeded by its path.
        dtype: storage dtype of the trained parameters; gates and full modules are fp32.
        split_state: the results of `Method.split` while the base was loaded, and the saved state.

    Raises:
        AdapterError: if the input embedding gets a LoRA and is not a plain embedding.
    """
    attached = AttachedAdapter(model, method)
    split_state = split_state or SplitState(method, plan, seed)
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
    """One initialised layer, on its base's device, with parameters stored in `dtype`.

    Tensors are contiguous, as in a file: another memory layout would change the order of sums, and
    a resumed run would differ in its last bits.
    """
    draws = generator(split_state.seed, "adapter", spec.path)
    with whole(base.parameters()):
        layer = split_state.method.build(
            base, spec, split_state.layers[spec.path], split_state.build_state(spec.path), draws
        )
    own = layer.state().keys()  # a parameter or buffer is saved once
    layer.start = {n: t for n, t in split_state.start_of(spec.path).items() if n not in own}
    device = base.device
    for name, parameter in layer.trained().items():
        storage = torch.float32 if layer.roles[name] in ALWAYS_FP32 else dtype
        parameter.data = parameter.data.to(device, storage).contiguous()
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            storage = dtype if name in layer.frozen else buffer.dtype
            layer._buffers[name] = buffer.to(device, storage).contiguous()
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
        with whole(module.parameters()):
            attached.full_modules[path] = _trainable_copy(module).requires_grad_(True)
        replace(model, path, attached.full_modules[path])


def _trainable_copy(module: nn.Module) -> nn.Module:
    if isinstance(module, FrozenLinear):
        return TrainedLinear(module)
    if isinstance(module, FrozenEmbedding):
        return TrainedEmbedding(module)
    return copy.deepcopy(module)
