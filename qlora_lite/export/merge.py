"""The weights of a merged model: the base as training used it, plus the trained update.

    weights = MergedWeights(TrainedLayers(source, "trained"), torch.bfloat16)
    write(weights, directory)

| base of the merge | an adapted weight                   | any other tensor                    |
|-------------------|-------------------------------------|-------------------------------------|
| `trained`         | quantised again and dequantised to  | in the dtype of training, cast once |
|                   | what forward used, plus delta       |                                     |
| `original`        | the checkpoint's, plus delta        | the checkpoint's, byte for byte     |

Sums are computed in fp32 and rounded once. Each tensor is computed from the base's checkpoint and
the adapter, and written in chunks of rows. So memory holds one tensor of the base, a chunk, and the
adapter. Names and order are those of the base's files: experts are written one by one if they are
stored so, and tensors that the model does not load, such as a vision tower, are copied.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_lite.adapters.layer import AdapterLayer, Factors
from qlora_lite.export.trained_layers import BaseOfMerge, TrainedLayers, chunk_rows
from qlora_lite.foundation.errors import CheckError
from qlora_lite.model.conversion import Place
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.prequantised import COMPANION, is_packed
from qlora_lite.shards.writer import MAX_SHARD_BYTES, ShardWriter, TensorSpec

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)"""


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model."""

    spec: TensorSpec
    stored: str
    """The tensor of the base's files that it is made from."""
    place: Place | None
    """Where it goes in the model; None if the model does not load it."""


class MergedWeights:
    """The tensors of a merged model, each computed when it is read.

    Args:
        dtype: of the floating-point tensors; None keeps the dtype of each tensor in the base.
    """

    def __init__(self, layers: TrainedLayers, dtype: torch.dtype | None = None) -> None:
        self.layers = layers
        tied = layers.source.facts.tied
        changed = layers.parts.changed_modules
        self.untied = [
            name
            for name, origin in tied.items()
            if changed & {name.rpartition(".")[0], origin.rpartition(".")[0]}
        ]
        """Parameters that are tied in the base and written as separate tensors."""
        self._tensors = {tensor.spec.name: tensor for tensor in self._list(dtype)}

    def _list(self, dtype: torch.dtype | None) -> Iterator[MergedTensor]:
        """The tensors of the base's files in their order, then the untied copies."""
        layers, tied = self.layers, self.layers.source.facts.tied
        for stored in layers.checkpoint.names:
            place = layers.places.get(stored)
            if COMPANION.search(stored) or (place is None and stored in self.untied):
                continue
            if place is None and stored in tied:
                place = Place(stored)
            name = place.name if place is not None and stored in self.untied else stored
            yield self._tensor(name, stored, place, dtype)
        for name in self.untied:
            yield self._tensor(name, layers.stored_name(name), Place(name), dtype)

    def _tensor(
        self, name: str, stored: str, place: Place | None, wanted: torch.dtype | None
    ) -> MergedTensor:
        """Integers, and what the model does not load, keep their dtype; packed codes are written as
        weights."""
        layers = self.layers
        info = layers.checkpoint.info(stored)
        spec = TensorSpec(name, info.dtype, info.shape)
        if place is not None and is_packed(layers.checkpoint, stored):
            unpacked = layers.source.facts.config.dtype or torch.bfloat16
            spec = TensorSpec(name, wanted or unpacked, layers.parameters[place.name].shape)
        elif place is not None and info.dtype.is_floating_point:
            spec = TensorSpec(name, wanted or info.dtype, info.shape)
        return MergedTensor(spec, stored, place)

    @property
    def base(self) -> BaseOfMerge:
        """The base that the adapter is added to."""
        return self.layers.base

    @property
    def specs(self) -> list[TensorSpec]:
        """Every tensor, in the order of the base's files."""
        return [tensor.spec for tensor in self._tensors.values()]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the bytes have."""
        sizes: dict[torch.dtype, int] = {}
        for spec in self.specs:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def identity(self) -> str:
        """A hash of everything that the tensors depend on."""
        source, rule = self.layers.source, self.layers.source.rule
        digest = hashlib.sha256(self.layers.checkpoint.fingerprint.encode())
        settings = [source.base.model_dump(mode="json"), source.adapter.model_dump(mode="json")]
        precisions = [rule.device.type, rule.compute, rule.storage, rule.norms, self.base]
        digest.update(json.dumps([settings, [str(p) for p in precisions], source.seed]).encode())
        for name, tensor in sorted(source.state.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        for spec in self.specs:
            digest.update(repr(spec).encode())
        return digest.hexdigest()

    def place(self, name: str) -> Place | None:
        """Where a written tensor goes in the model; None if the model does not load it."""
        return self._tensors[name].place

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor, as it will be written."""
        spec = self._tensors[name].spec
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        flat, start = whole.view(-1), 0
        for part in self.chunks(name):
            flat[start : start + part.numel()] = part.flatten()
            start += part.numel()
        return whole

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor in pieces along its first dimension, in the dtype of its spec, on the CPU.

        Each piece is valid until the next one is read.
        """
        tensor = self._tensors[name]
        dtype, shape = tensor.spec.dtype, tensor.spec.shape
        rows = None if tensor.place is None else self._changed_rows(tensor, tensor.place.name)
        if rows is None:
            rows = self.layers.stored(tensor.stored)
            yield from (_rounded(part, dtype, name) for part in rows)
        elif tensor.place is not None and self._is_transposed(tensor.place.name):
            whole = torch.empty(shape, dtype=dtype)
            start = 0
            for part in rows:
                whole[:, start : start + len(part)] = _rounded(part, dtype, name).T
                start += len(part)
            yield whole
        else:
            yield from (_rounded(part, dtype, name) for part in rows)

    def _is_transposed(self, name: str) -> bool:
        return name in self.layers.parameters and self.layers.parameters[name].transposed

    def _changed_rows(self, tensor: MergedTensor, name: str) -> Iterator[Tensor] | None:
        """Rows (along the outputs) that replace the stored ones; None if nothing changed.

        Args:
            name: of the parameter that the tensor is, or is a part of.
        """
        layers, parts, module = self.layers, self.layers.parts, name.rpartition(".")[0]
        if name in parts.full_parameters:
            return _split(parts.full_parameters[name])
        if module in parts.layers and name.endswith(".weight"):
            return _adapted_rows(layers.layer(module))
        if module in parts.embeddings:
            return _add(layers.unquantised(name, tensor.stored), layers.embedding_pair(module))
        if self.base == "original" or not tensor.spec.dtype.is_floating_point:
            return None
        if layers.quant(name) is not None:
            return _dense_rows(layers.frozen(name))
        return layers.unquantised(name, tensor.stored)


def write(
    weights: MergedWeights,
    directory: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write all tensors as safetensors, or continue after the last one that is complete.

    Returns the SHA-256 of every file, by name.

    Raises:
        RunError: if the disk has too little space left.
        ExportError: if the disk fills up while writing; the same call continues.
    """
    total = sum(spec.num_bytes for spec in weights.specs)
    with ShardWriter(directory, weights.specs, weights.identity, max_shard_bytes) as writer:
        pending = writer.pending
        done = total - sum(spec.num_bytes for spec in pending)
        for spec in pending:
            writer.write(spec.name, weights.chunks(spec.name))
            done += spec.num_bytes
            if progress is not None:
                progress(done, total)
    return writer.hashes


def _rounded(part: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A part in the dtype of the files, on the CPU.

    Raises:
        CheckError: if it becomes infinite, or was not finite. The base's own bytes are not checked.
    """
    rounded = part.to("cpu", dtype)
    if part.dtype != dtype and not rounded.isfinite().all():
        problem = (
            f"too large for {str(dtype).removeprefix('torch.')}. Use --dtype bf16"
            if part.isfinite().all()
            else "not finite: the adapter or the base is damaged"
        )
        raise CheckError(f"a merged value of {name} is {problem}")
    return rounded


def _adapted_rows(layer: AdapterLayer) -> Iterator[Tensor]:
    """The merged weight of an adapted layer, in fp32."""
    pair = layer.factors() if type(layer).merged is AdapterLayer.merged else None
    if pair is None or pair.relative_error > 0:
        return _split(layer.merged(layer.base.dense()))
    return _add(_dense_rows(layer.base), pair)


def _split(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(chunk_rows(tuple(tensor.shape)))


def _dense_rows(linear: FrozenLinear) -> Iterator[Tensor]:
    """The dequantised rows that forward uses."""
    for _, _, piece in linear.pieces():
        yield from _split(piece)


def _add(rows: Iterator[Tensor], pair: Factors) -> Iterator[Tensor]:
    """rows + up @ down in fp32. Rows whose `up` is zero are unchanged, down to signs of zeros."""
    start = 0
    for part in rows:
        up = pair.up[start : start + len(part)].to(part.device)
        summed = torch.addmm(part.float(), up, pair.down.to(part.device))
        yield torch.where(up.any(dim=1, keepdim=True), summed, part.float())
        start += len(part)
