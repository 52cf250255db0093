"""What an adapter's tensors are, found from its settings and the base's modules alone.

Every tensor has exactly one place and every place its tensors, or the merge fails before it begins:
an adapter that is applied in part gives a model that nobody trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_lite.adapters.attach import choose
from qlora_lite.adapters.method import AdapterSettings, Method
from qlora_lite.adapters.split_state import by_layer
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.catalogue import method_for
from qlora_lite.model.targets import LinearSpec, linear_specs


@dataclass(frozen=True)
class Learned:
    """An adapter's tensors, sorted."""

    whole: dict[str, Tensor]
    """Parameters that were trained whole, by name, in fp32; matrices along their outputs."""
    layers: dict[str, dict[str, Tensor]]
    """Tensors of each adapted linear layer, by path."""
    embeddings: dict[str, dict[str, Tensor]]
    """Tensors of an adapted embedding, by path."""
    specs: dict[str, LinearSpec]
    """The adapted linear layers, by path."""
    method: Method
    """With its plans made."""

    @property
    def paths(self) -> set[str]:
        """Modules that are not the base's any more."""
        owners = {name.rpartition(".")[0] for name in self.whole}
        return {*owners, *self.layers, *self.embeddings}


def sort(state: Mapping[str, Tensor], settings: AdapterSettings, model: nn.Module) -> Learned:
    """The tensors of `native.safetensors` by what they are in `model`, which may have no weights.

    Raises:
        AdapterError: naming a tensor that has no place here, or that is missing.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = {name: tensor.float() for name, tensor in state.items() if name in parameters}
    for name, tensor in whole.items():
        _check_shape(name, tensor, model)
    _check_whole(set(whole), settings, model)
    rest = {name: tensor for name, tensor in state.items() if name not in whole}
    trained_whole = [name.rpartition(".")[0] for name in whole]
    method = method_for(settings)
    specs = {s.path: s for s in choose(linear_specs(model), method, trained_whole)}
    embeddings: dict[str, dict[str, Tensor]] = {}
    if settings.embedding_rank:
        table = model.get_input_embeddings()  # type: ignore[operator]
        path = next(path for path, module in model.named_modules() if module is table)
        embeddings[path] = by_layer(rest, [path]).get(path, {})
        if embeddings[path].keys() != {"a", "b"}:
            raise AdapterError(misfit(f"{path}.a", settings.kind))
    layers = by_layer(rest, specs)
    if missing := specs.keys() - layers.keys():
        raise AdapterError(misfit(f"{min(missing)}.*", settings.kind))
    placed = {f"{path}.{name}" for path, own in (layers | embeddings).items() for name in own}
    if odd := rest.keys() - placed:
        raise AdapterError(misfit(min(odd), settings.kind))
    return Learned(whole, layers, embeddings, specs, method)


def _check_whole(names: set[str], settings: AdapterSettings, model: nn.Module) -> None:
    """A module is trained with all of its parameters, and only on request."""
    if names and not (settings.train_norms or settings.train_modules):
        raise AdapterError(misfit(min(names), settings.kind))
    for path in {name.rpartition(".")[0] for name in names}:
        own = {f"{path}.{leaf}" for leaf, _ in model.get_submodule(path).named_parameters()}
        if missing := own - names:
            raise AdapterError(misfit(min(missing), settings.kind))


def _check_shape(name: str, tensor: Tensor, model: nn.Module) -> None:
    expected = tuple(model.get_parameter(name).shape)
    if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D):
        expected = expected[::-1]
    if tuple(tensor.shape) != expected:
        raise AdapterError(
            f"{name} has shape {tuple(tensor.shape)} in the adapter and {expected} in the base. "
            "The adapter was trained on another base model: give that one"
        )


def misfit(name: str, kind: str) -> str:
    """The message about a tensor that is too many or too few."""
    return (
        f"the adapter and its settings disagree about {name}: {kind} with these settings trains no "
        "such tensor on this base, or the adapter lacks it. Nothing is merged in part: use the "
        "run's own recipe.json, adapter/ and base"
    )
