"""Merged weights: what training held of the base plus what it learned, one tensor at a time.

    weights = MergedWeights(source, "trained", torch.bfloat16)
    write(weights, directory)

| base of the merge | an adapted weight                   | any other tensor                    |
|-------------------|-------------------------------------|-------------------------------------|
| `trained`         | quantised again and dequantised to  | as training held it, cast once      |
|                   | what forward used, plus delta       |                                     |
| `original`        | the checkpoint's, plus delta        | the checkpoint's, byte for byte     |

Sums are made in fp32 and rounded once. No model is loaded: each tensor is made from the base's
checkpoint and the adapter alone, and leaves in chunks of rows. So memory holds one tensor as
training held it, a chunk, and the adapter. Names and order are those of the base's files.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_lite.adapters.attach import build_layer
from qlora_lite.adapters.layer import AdapterLayer, Factors
from qlora_lite.adapters.method import AdapterSettings, Requirement
from qlora_lite.adapters.ranks import scale_of
from qlora_lite.adapters.split_state import SplitState
from qlora_lite.export.adapter_parts import misfit, sort
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import AdapterError, ExportError
from qlora_lite.methods.catalogue import method_for
from qlora_lite.model.config import read_config
from qlora_lite.model.frozen import FrozenLinear, Scratch
from qlora_lite.model.load import Base, skeleton
from qlora_lite.model.prequantised import COMPANION, is_packed, read_packed, stored_quant
from qlora_lite.model.quant import BF16, FP32, NF4, Int8, Quant
from qlora_lite.model.quantise import StoredWeight, copy_weight, quantise
from qlora_lite.shards.names import match
from qlora_lite.shards.reader import Checkpoint
from qlora_lite.shards.writer import MAX_SHARD_BYTES, ShardWriter, TensorSpec

CHUNK_WEIGHTS = 2**20
"""Weights that are added and rounded at a time: 4 MiB in fp32."""

BaseOfMerge = Literal["trained", "original"]

Progress = Callable[[int, int], None]
"""(bytes written, bytes in all)"""


@dataclass(frozen=True)
class MergeSource:
    """A trained adapter and the base that it was trained on."""

    base: Base
    path: Path
    """The base's directory, as `locate` finds it."""
    rule: DeviceRule
    """What training held the base in; the device is where sums are made."""
    adapter: AdapterSettings
    state: Mapping[str, Tensor]
    """The adapter's state by `path.name`, as `native.safetensors` has it."""
    seed: int


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model."""

    spec: TensorSpec
    stored: str
    """The checkpoint's tensor that it is made of."""
    ours: str
    """Its name in the model."""

    @property
    def path(self) -> str:
        """Of the module that owns it."""
        return self.ours.rpartition(".")[0]


class MergedWeights:
    """The tensors of a merged model, made when they are asked for.

    Args:
        base: what the adapter is added to.
        dtype: of the floating-point tensors; None keeps each in the dtype that the base stores.

    Raises:
        AdapterError: if a tensor of the adapter has no place in this base, or one is missing.
        ExportError: if this base cannot be merged into.
    """

    def __init__(
        self, source: MergeSource, base: BaseOfMerge, dtype: torch.dtype | None = None
    ) -> None:
        self.source = source
        self.base = base
        self._scratch = Scratch()
        config = read_config(str(source.path), trust_remote_code=source.base.trust_remote_code)
        if base not in possible_bases(source):
            raise ExportError(
                f"got base={base}, but this adapter is right only on the base that it was trained "
                f"on: {_why_only_trained(source)}. Take base=trained"
            )
        unpacked = config.dtype or torch.bfloat16
        self.checkpoint = Checkpoint.open(source.path)
        self.model = skeleton(config, source.base)
        """Without weights: the modules by name."""
        self._learned = sort(source.state, source.adapter, self.model)
        self._starts = SplitState(
            self._learned.method,
            list(self._learned.specs.values()),
            source.seed,
            source.state,
        )
        names, tied = _names(self.model, self.checkpoint)
        changed = self._learned.paths
        self.untied = [
            copy
            for copy, origin in tied.items()
            if changed & {copy.rpartition(".")[0], origin.rpartition(".")[0]}
        ]
        """Parameters that shared another's storage in the base and are tensors of their own now."""
        stored_as = {ours: stored for stored, ours in names.items()}
        places = [(stored, stored, ours) for stored, ours in names.items()]
        places += [(copy, stored_as[tied[copy]], copy) for copy in self.untied]
        self._entries = {
            name: MergedTensor(self._spec(name, stored, ours, dtype, unpacked), stored, ours)
            for name, stored, ours in places
        }

    def _spec(
        self, name: str, stored: str, ours: str, wanted: torch.dtype | None, unpacked: torch.dtype
    ) -> TensorSpec:
        """Numbers that are no floating-point ones stay as they are; codes become weights."""
        info = self.checkpoint.info(stored)
        if is_packed(self.checkpoint, stored):
            shape = tuple(self.model.get_parameter(ours).shape)
            return TensorSpec(name, wanted or unpacked, shape)
        kept = info.dtype
        return TensorSpec(name, (wanted or kept) if kept.is_floating_point else kept, info.shape)

    @property
    def specs(self) -> list[TensorSpec]:
        """Every tensor, in the order of the base's files."""
        return [entry.spec for entry in self._entries.values()]

    @property
    def dtype(self) -> torch.dtype:
        """That of most of the bytes."""
        sizes: dict[torch.dtype, int] = {}
        for spec in self.specs:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def identity(self) -> str:
        """A hash of everything that the tensors depend on."""
        digest = hashlib.sha256(self.checkpoint.fingerprint.encode())
        source, rule = self.source, self.source.rule
        settings = [source.base.model_dump(mode="json"), source.adapter.model_dump(mode="json")]
        precisions = [rule.device.type, rule.compute, rule.storage, rule.norms, self.base]
        digest.update(json.dumps([settings, [str(p) for p in precisions], source.seed]).encode())
        for name, tensor in sorted(source.state.items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        for spec in self.specs:
            digest.update(repr(spec).encode())
        return digest.hexdigest()

    def parameter_name(self, name: str) -> str:
        """The model's name of a tensor."""
        return self._entries[name].ours

    def tensor(self, name: str) -> Tensor:
        """A copy of a whole tensor, as it will be written."""
        spec = self._entries[name].spec
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        flat, start = whole.view(-1), 0
        for part in self.chunks(name):
            flat[start : start + part.numel()] = part.flatten()
            start += part.numel()
        return whole

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor in pieces along its first dimension, in the dtype of its spec, on the CPU.

        Each piece is valid until the next is asked for.
        """
        entry = self._entries[name]
        dtype, shape = entry.spec.dtype, entry.spec.shape
        rows = self._rows(entry)
        if rows is None:
            yield from (part.to(dtype) for part in self._stored(entry))
        elif self._is_transposed(entry):
            whole = torch.empty(shape, dtype=dtype)
            start = 0
            for part in rows:
                whole[:, start : start + len(part)] = part.T
                start += len(part)
            yield whole
        else:
            yield from (part.to("cpu", dtype) for part in rows)

    def _rows(self, entry: MergedTensor) -> Iterator[Tensor] | None:
        """What training changed or held otherwise, along the outputs; None: as it is stored."""
        learned, path = self._learned, entry.path
        if entry.ours in learned.whole:
            return _cut(learned.whole[entry.ours])
        if path in learned.layers and entry.ours.endswith(".weight"):
            return self._adapted(entry)
        if path in learned.embeddings:
            pair = self._embedding_pair(path)
            return _add(self._held(entry), pair)
        if self.base == "original" or not entry.spec.dtype.is_floating_point:
            return None
        if self._quant(entry) is not None:
            return _dense(self._frozen(entry))
        return self._held(entry)

    def _adapted(self, entry: MergedTensor) -> Iterator[Tensor]:
        layer = self._layer(entry)
        pair = layer.factors() if type(layer).merged is AdapterLayer.merged else None
        if pair is None or pair.relative_error > 0:
            return _cut(layer.merged(layer.base.dense()))
        return _add(_dense(layer.base), pair)

    def _layer(self, entry: MergedTensor) -> AdapterLayer:
        """The trained layer of one weight, on a base of its own."""
        path = entry.path
        spec, saved = self._starts.specs[path], self._learned.layers[path]
        layer = build_layer(self._frozen(entry), spec, self._starts, torch.float32)
        expected = layer.state()
        if odd := saved.keys() ^ expected.keys():
            raise AdapterError(misfit(f"{path}.{min(odd)}", self.source.adapter.kind))
        for name, parameter in layer.trained().items():
            if saved[name].shape != parameter.shape:
                raise AdapterError(
                    f"{path}.{name} has shape {tuple(saved[name].shape)} in the adapter and "
                    f"{tuple(parameter.shape)} by its settings. Restore the run's files"
                )
        layer.load_state(saved)
        return layer

    def _embedding_pair(self, path: str) -> Factors:
        """What is added to an embedding: rows are tokens."""
        saved, settings = self._learned.embeddings[path], self.source.adapter
        scale = scale_of(settings.alpha, settings.embedding_rank, settings.scaling)
        return Factors(down=scale * saved["b"].float().T, up=saved["a"].float().T)

    def _frozen(self, entry: MergedTensor) -> FrozenLinear:
        """One linear layer without its bias, as training held it; or exactly as it is stored."""
        rule = self.source.rule
        if is_packed(self.checkpoint, entry.stored):
            return read_packed(self.checkpoint, entry.stored, rule, None, self._scratch)
        weight = StoredWeight(self.checkpoint, entry.stored, self._is_transposed(entry))
        if self.base == "original":
            exact: Quant = BF16() if weight.dtype == torch.bfloat16 else FP32()
            rule = dataclasses.replace(rule, compute=torch.float32)
            return quantise(weight, exact, rule, scratch=self._scratch)
        if (quant := self._quant(entry)) is not None:
            split = self._starts.split(entry.path)
            return quantise(weight, quant, rule, split=split, scratch=self._scratch)
        plain = copy_weight(weight, self._dtype_at_rest(entry), rule.device)
        label: Quant = FP32() if plain.dtype == torch.float32 else BF16()
        return FrozenLinear(
            *weight.shape, label, rule.compute, plain, source=weight, scratch=self._scratch
        )

    def _quant(self, entry: MergedTensor) -> Quant | None:
        """How training quantised a tensor; None if it held it in a plain dtype."""
        module, base = self.model.get_submodule(entry.path), self.source.base
        is_linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if not is_linear or not entry.ours.endswith(".weight"):
            return None
        if module is not self.model.get_output_embeddings():
            return base.quant
        return {"16bit": None, "int8": Int8(), "nf4": NF4()}[base.head]

    def _dtype_at_rest(self, entry: MergedTensor) -> torch.dtype:
        """In what training held a tensor that it did not quantise."""
        module, rule = self.model.get_submodule(entry.path), self.source.rule
        if len(entry.spec.shape) == 1:
            return rule.norms
        if isinstance(module, nn.Embedding) or module is self.model.get_output_embeddings():
            return torch.float32 if isinstance(self.source.base.quant, FP32) else rule.storage
        return rule.compute

    def _is_transposed(self, entry: MergedTensor) -> bool:
        """Stored as (d_in, d_out)."""
        module = self.model.get_submodule(entry.path)
        return isinstance(module, Conv1D) and len(entry.spec.shape) == 2

    def _held(self, entry: MergedTensor) -> Iterator[Tensor]:
        """A tensor that was not quantised, in fp32 after the rounding that training gave it."""
        exact = self.base == "original"
        held = torch.float32 if exact else self._dtype_at_rest(entry)
        return (part.to(held).float() for part in self._stored(entry))

    def _stored(self, entry: MergedTensor) -> Iterator[Tensor]:
        """The checkpoint's tensor, in pieces along its first dimension."""
        info = self.checkpoint.info(entry.stored)
        if not info.shape:
            yield self.checkpoint.read(entry.stored)
            return
        step = _chunk_rows(info.shape)
        for start in range(0, info.shape[0], step):
            yield self.checkpoint.rows(entry.stored, start, min(start + step, info.shape[0]))


def write(
    weights: MergedWeights,
    directory: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write all tensors as safetensors, or go on behind the last one that is complete.

    Raises:
        RunError: if the disk has too little space left.
        ExportError: if it filled up all the same; the same call goes on.
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


def possible_bases(source: MergeSource) -> tuple[BaseOfMerge, ...]:
    """What this adapter can be added to.

    A checkpoint that was quantised before has no original weights; and a method that began before
    quantisation took something out of them, so it is right on its own base only.
    """
    if Requirement.ORIGINAL_WEIGHTS in method_for(source.adapter).requires:
        return ("trained",)
    config = read_config(str(source.path), trust_remote_code=source.base.trust_remote_code)
    is_packed_base = stored_quant(config, source.base.quant) is not None
    return ("trained",) if is_packed_base else ("trained", "original")


def _why_only_trained(source: MergeSource) -> str:
    if Requirement.ORIGINAL_WEIGHTS in method_for(source.adapter).requires:
        return f"adapter={source.adapter.kind} with its settings changed the weights at its start"
    return f"the checkpoint {source.path} is quantised itself and has no original weights"


def _names(model: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """The model's name of each stored tensor; and of which parameter another one is a copy."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)  # type: ignore[arg-type]
    names = match(
        [name for name in checkpoint.names if not COMPANION.search(name)],
        [name for name, _ in model.named_parameters(remove_duplicate=False)],
        buffers=[name for name, _ in model.named_buffers()],
        tied=tied,
        prefix=model.base_model_prefix,  # type: ignore[arg-type]
        ignored=model._keys_to_ignore_on_load_unexpected or (),  # type: ignore[arg-type]
    )
    return names, tied


def _chunk_rows(shape: tuple[int, ...]) -> int:
    return max(CHUNK_WEIGHTS * shape[0] // max(torch.Size(shape).numel(), 1), 1)


def _cut(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(_chunk_rows(tuple(tensor.shape)))


def _dense(linear: FrozenLinear) -> Iterator[Tensor]:
    """The rows that forward uses."""
    for _, _, piece in linear.pieces():
        yield from _cut(piece)


def _add(rows: Iterator[Tensor], pair: Factors) -> Iterator[Tensor]:
    """rows + up @ down in fp32; where nothing is added, even the sign of a zero is kept."""
    start = 0
    for part in rows:
        up = pair.up[start : start + len(part)].to(part.device)
        summed = torch.addmm(part.float(), up, pair.down.to(part.device))
        yield torch.where(up.any(dim=1, keepdim=True), summed, part.float())
        start += len(part)
