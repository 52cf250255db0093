"""The layers of a trained run, rebuilt one at a time from its files. No model is loaded.

    layers = TrainedLayers(source, "trained")
    layers.layer("model.layers.0.mlp.up_proj").delta()

Merging adds what these layers learned to the base; inspecting looks at it.

| base       | the frozen weight of a layer                                                 |
|------------|------------------------------------------------------------------------------|
| `trained`  | quantised again as training did, and dequantised to what forward used        |
| `original` | as the checkpoint stores it                                                  |
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from qlora_lite.adapters.attach import build_layer
from qlora_lite.adapters.layer import AdapterLayer, Factors
from qlora_lite.adapters.method import AdapterSettings, Requirement
from qlora_lite.adapters.ranks import scale_of
from qlora_lite.adapters.split_state import SplitState
from qlora_lite.export.adapter_parts import mismatch, sort_by_module
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import AdapterError, ExportError
from qlora_lite.methods.catalogue import method_for
from qlora_lite.model.base_files import BaseFiles, open_checkpoint
from qlora_lite.model.facts import BaseFacts
from qlora_lite.model.frozen import FrozenLinear, Scratch
from qlora_lite.model.prequantised import is_packed, read_packed, stored_quant
from qlora_lite.model.quant import BF16, FP32, NF4, Int8, Quant
from qlora_lite.model.quantise import StoredWeight, copy_weight, quantise
from qlora_lite.model.settings import Base
from qlora_lite.model.shape import ParameterShape

CHUNK_WEIGHTS = 2**20
"""Weights that are read, added and rounded at a time: 4 MiB in fp32."""

BaseOfMerge = Literal["trained", "original"]


@dataclass(frozen=True)
class MergeSource:
    """A trained adapter and the base that it was trained on."""

    base: Base
    facts: BaseFacts
    files: BaseFiles
    rule: DeviceRule
    """The dtypes of training, and the device on which to compute."""
    adapter: AdapterSettings
    state: Mapping[str, Tensor]
    """The adapter's state by `path.name`, from `native.safetensors`."""
    seed: int

    @cached_property
    def bases(self) -> tuple[BaseOfMerge, ...]:
        """The bases that this adapter can be added to.

        A checkpoint that was already quantised has no original weights. A method that changed the
        weights before quantisation fits only the base that it made.
        """
        return ("trained",) if self._only_trained else ("trained", "original")

    @cached_property
    def _only_trained(self) -> str | None:
        """Why the adapter does not fit the original base; None if it does."""
        if Requirement.ORIGINAL_WEIGHTS in method_for(self.adapter).requires:
            return f"adapter={self.adapter.kind} with its settings changed the base weights"
        if stored_quant(self.facts.config, self.base.quant) is not None:
            return f"the checkpoint {self.files.weights} is quantised and has no original weights"
        return None

    def require(self, base: BaseOfMerge) -> None:
        """Check that the adapter can be added to `base`.

        Raises:
            ExportError: if it cannot.
        """
        if base not in self.bases:
            raise ExportError(
                f"got base={base}, but this adapter fits only the base that it was trained on: "
                f"{self._only_trained}. Use base=trained"
            )


class TrainedLayers:
    """The adapted layers of a run, and the frozen tensors of its base.

    Raises:
        AdapterError: if a tensor of the adapter matches no module of this base, or one is missing.
        ExportError: if the adapter does not fit `base`.
    """

    def __init__(self, source: MergeSource, base: BaseOfMerge) -> None:
        source.require(base)
        self.source = source
        self.base = base
        self.checkpoint = open_checkpoint(source.files, source.facts)
        self.method = method_for(source.adapter)
        self.parts = sort_by_module(source.state, self.method, source.facts)
        self.parameters = {p.name: p for p in source.facts.shape.parameters}
        self.places = source.facts.places(self.checkpoint)
        """Where every stored tensor that the model loads goes."""
        self.stored_names = {
            place.name: stored for stored, place in self.places.items() if place.part is None
        }
        """The checkpoint's name of every tensor of the model that is stored whole."""
        self._split_state = SplitState(self.method, self.parts.plan, source.seed, source.state)
        self._scratch = Scratch()

    def layer(self, path: str) -> AdapterLayer:
        """The trained layer at `path`, with its frozen weight and without a bias."""
        spec, saved = self._split_state.specs[path], self.parts.layers[path]
        layer = build_layer(self.frozen(f"{path}.weight"), spec, self._split_state, torch.float32)
        if unmatched := saved.keys() ^ layer.state().keys():
            raise AdapterError(mismatch(f"{path}.{min(unmatched)}", self.source.adapter.kind))
        for name, parameter in layer.trained().items():
            if saved[name].shape != parameter.shape:
                raise AdapterError(
                    f"{path}.{name} has shape {tuple(saved[name].shape)} in the adapter and "
                    f"{tuple(parameter.shape)} according to its settings. Restore the run's files"
                )
        layer.load_state(saved)
        return layer

    def embedding_pair(self, path: str) -> Factors:
        """The LoRA pair of the embedding at `path`: up @ down is (tokens, hidden)."""
        saved, settings = self.parts.embeddings[path], self.source.adapter
        scale = scale_of(settings.alpha, settings.embedding_rank, settings.scaling)
        return Factors(down=scale * saved["b"].float().T, up=saved["a"].float().T)

    def frozen(self, name: str) -> FrozenLinear:
        """The linear layer of a weight, without its bias."""
        rule, stored = self.source.rule, self.stored_name(name)
        if is_packed(self.checkpoint, stored):
            return read_packed(self.checkpoint, stored, rule, None, self._scratch)
        parameter = self.parameters[name]
        weight = StoredWeight(self.checkpoint, stored, parameter.transposed)
        if self.base == "original":
            exact: Quant = BF16() if weight.dtype == torch.bfloat16 else FP32()
            rule = dataclasses.replace(rule, compute=torch.float32)
            return quantise(weight, exact, rule, scratch=self._scratch)
        if (quant := self.quant(name)) is not None:
            split = self._split_state.split(parameter.module)
            return quantise(weight, quant, rule, split=split, scratch=self._scratch)
        plain = copy_weight(weight, self._storage_dtype(parameter), rule.device)
        label: Quant = FP32() if plain.dtype == torch.float32 else BF16()
        return FrozenLinear(
            *weight.shape, label, rule.compute, plain, source=weight, scratch=self._scratch
        )

    def quant(self, name: str) -> Quant | None:
        """How training quantised a tensor; None if it did not."""
        parameter, base = self.parameters.get(name), self.source.base
        if parameter is None or not name.endswith(".weight"):
            return None
        if parameter.role == "linear":
            return None if self._is_skipped(name) else base.quant
        if parameter.role == "head":
            return {"16bit": None, "int8": Int8(), "nf4": NF4()}[base.head]
        return None

    def unquantised(self, name: str, stored: str) -> Iterator[Tensor]:
        """A tensor that was not quantised, or a part of it: rounded as in training, then in fp32.

        Yields chunks along the first dimension.
        """
        if self.base == "original" or name not in self.parameters:
            return (part.float() for part in self.stored(stored))
        dtype = self._storage_dtype(self.parameters[name])
        return (part.to(dtype).float() for part in self.stored(stored))

    def stored(self, stored: str) -> Iterator[Tensor]:
        """The checkpoint's tensor, in chunks along its first dimension."""
        info = self.checkpoint.info(stored)
        if not info.shape:
            yield self.checkpoint.read(stored)
            return
        step = chunk_rows(info.shape)
        for start in range(0, info.shape[0], step):
            yield self.checkpoint.rows(stored, start, min(start + step, info.shape[0]))

    def num_bytes(self, name: str) -> int:
        """Stored bytes of a tensor."""
        return self.checkpoint.info(self.stored_name(name)).num_bytes

    def _is_skipped(self, name: str) -> bool:
        """Whether a quantised checkpoint left this weight unquantised."""
        is_quantised = stored_quant(self.source.facts.config, self.source.base.quant) is not None
        return is_quantised and not is_packed(self.checkpoint, self.stored_name(name))

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a parameter; of a tied one, that of the one that is stored."""
        return self.stored_names[self.source.facts.tied.get(name, name)]

    def _storage_dtype(self, parameter: ParameterShape) -> torch.dtype:
        """The dtype in which training stored a tensor that it did not quantise."""
        rule = self.source.rule
        if len(parameter.shape) == 1:
            return rule.norms
        if parameter.role == "linear":  # skipped: it stays as it is stored
            return self.checkpoint.info(self.stored_name(parameter.name)).dtype
        if parameter.role in ("embedding", "head"):
            return torch.float32 if isinstance(self.source.base.quant, FP32) else rule.storage
        return rule.compute


def chunk_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor that hold about `CHUNK_WEIGHTS` numbers, at least one."""
    return max(CHUNK_WEIGHTS * shape[0] // max(torch.Size(shape).numel(), 1), 1)
