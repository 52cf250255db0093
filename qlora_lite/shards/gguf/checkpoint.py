"""Read the tensors of a GGUF file under the names of transformers, one slice at a time.

    checkpoint = GgufCheckpoint(read_header(path), sources)
    checkpoint.rows("model.layers.0.self_attn.q_proj.weight", 0, 64)

Quantised types are dequantised to fp32, only what is
asked for. F32, F16 and BF16 keep their dtype and are views of the memory-mapped file where nothing
has to be reordered: copy what you keep. Values equal those that transformers reads from the file.
"""

import functools
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.checkpoint import Checkpoint, TensorInfo
from qlora_lite.shards.fingerprint import sampled_hash
from qlora_lite.shards.gguf.file import StoredTensor, map_file
from qlora_lite.shards.gguf.header import GgufHeader
from qlora_lite.shards.gguf.types import FLOATS, block_size, dequantise

_WEIGHTS_AT_ONCE = 2**18
"""Limits the temporary memory of a reordered or cut slice to 1 MiB."""


@dataclass(frozen=True)
class TensorSource:
    """How a tensor of transformers is made of a stored one.

    `row_order` and `transposed` exclude each other.
    """

    stored: str
    """The name in the GGUF file."""

    row_order: Tensor | None = None
    """Row i of the result is the stored row `row_order[i]`; int64."""

    transposed: bool = False
    """The result is the transpose of the stored matrix."""

    add: float = 0.0
    """Added to the values; the result is fp32 then."""

    shape: tuple[int, ...] | None = None
    """The shape of the result, if it differs. The first axis stays as it is."""

    def __post_init__(self) -> None:
        assert self.row_order is None or not self.transposed, f"{self.stored}: not both"


class GgufCheckpoint(Checkpoint):
    """The tensors of a model in GGUF.

    Args:
        header: of all its files.
        sources: for each tensor of transformers, what it is made of.

    Raises:
        BaseModelError: if a stored tensor is missing, or has a shape that its source excludes.
    """

    def __init__(self, header: GgufHeader, sources: Mapping[str, TensorSource]) -> None:
        self._header = header
        self._sources = dict(sources)
        self._maps: dict[Path, mmap.mmap] = {}
        infos = {name: self._describe(name) for name in sources}
        super().__init__(
            list(header.files), (infos[name] for name in sorted(infos, key=self._position))
        )

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.info(name).shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor[start:stop]`, contiguous."""
        info, source, stored = self.info(name), self._sources[name], self._stored(name)
        start, stop = _within(start, stop, info.shape[0])
        if source.transposed:
            rows = self._columns(stored, start, stop).T
        else:
            rows = self._rows(stored, start, stop, source.row_order)
        return _add(rows, source, stored).view(stop - start, *info.shape[1:])

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor[:, start:stop]`, not contiguous."""
        info, source, stored = self.info(name), self._sources[name], self._stored(name)
        if len(info.shape) != 2 or len(stored.shape) != 2:
            return self.read(name)[:, start:stop]
        start, stop = _within(start, stop, info.shape[1])
        if source.transposed:
            columns = self._rows(stored, start, stop, None).T
        else:
            columns = self._columns(stored, start, stop)
        if source.row_order is not None:
            columns = columns[source.row_order]
        return _add(columns, source, stored)

    def close(self) -> None:
        """Release the memory maps; the next read opens them again."""
        self._maps.clear()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, headers and 64 evenly spaced samples: quick for any size."""
        starts = self._header.data_starts
        return sampled_hash((file, 0, stop) for file, stop in zip(self.files, starts, strict=True))

    def _stored(self, name: str) -> StoredTensor:
        return self._header.tensors[self._sources[name].stored]

    def _position(self, name: str) -> tuple[int, int]:
        stored = self._stored(name)
        return self._header.files.index(stored.file), stored.offset

    def _describe(self, name: str) -> TensorInfo:
        """The tensor as it is returned.

        Raises:
            BaseModelError: if the file lacks the stored tensor, or the shapes disagree.
        """
        source = self._sources[name]
        if source.stored not in self._header.tensors:
            raise BaseModelError(
                f"{self._header.files[0]} has no tensor {source.stored!r}, which is needed for "
                f"{name}. The file is incomplete: use another file of this model"
            )
        stored = self._stored(name)
        made = stored.shape[::-1] if source.transposed else stored.shape
        shape = source.shape or made
        fits = shape[0] == made[0] and math.prod(shape) == math.prod(made)
        if source.row_order is not None:
            fits = fits and len(source.row_order) == made[0]
        if source.transposed:
            fits = fits and len(made) == 2
        if not fits:
            raise BaseModelError(
                f"{stored.file}: the tensor {stored.name!r} has the shape {stored.shape}, which "
                f"does not fit {name}. The file is damaged or its metadata are of another model: "
                "use another file of this model"
            )
        dtype = torch.float32 if source.add else FLOATS.get(stored.kind, torch.float32)
        return TensorInfo(name, dtype, shape, math.prod(shape) * dtype.itemsize, stored.file)

    def _bytes(self, stored: StoredTensor) -> Tensor:
        """The stored bytes, a view of the map."""
        if stored.file not in self._maps:
            self._maps[stored.file] = map_file(stored.file)
        data = self._maps[stored.file]
        if stored.offset + stored.num_bytes > len(data):
            raise BaseModelError(f"{stored.file} became shorter. Download it again")
        return torch.frombuffer(
            data, dtype=torch.uint8, count=stored.num_bytes, offset=stored.offset
        )

    def _rows(self, stored: StoredTensor, start: int, stop: int, order: Tensor | None) -> Tensor:
        """Rows `start` to `stop` of a stored tensor in a given order, contiguous."""
        if stored.kind in FLOATS:
            return _floats(self._bytes(stored), stored)[_chosen(start, stop, order)]
        columns = stored.shape[-1]
        if len(stored.shape) == 1:
            whole = torch.empty(1, columns)
            self._dequantise(stored, range(1), 0, whole)
            return whole[0][_chosen(start, stop, order)]
        inner = math.prod(stored.shape[1:-1])  # more than 1 where experts are stacked
        rows: range | Tensor = range(start * inner, stop * inner)
        if order is not None:
            rows = (order[start:stop, None] * inner + torch.arange(inner)).flatten()
        out = torch.empty(len(rows), columns)
        self._dequantise(stored, rows, 0, out)
        return out

    def _columns(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` of a stored matrix; the transpose is contiguous."""
        if stored.kind in FLOATS:
            return _floats(self._bytes(stored), stored)[:, start:stop].T.contiguous().T
        out = torch.empty(stop - start, stored.shape[0]).T
        self._dequantise(stored, range(stored.shape[0]), start, out)
        return out

    def _dequantise(
        self, stored: StoredTensor, rows: range | Tensor, first: int, out: Tensor
    ) -> None:
        """Dequantise some rows, from the column `first`, into `out` (rows, columns)."""
        if not out.numel():
            return
        weights, num_bytes = block_size(stored.kind)
        low, high = first // weights, -(-(first + out.shape[1]) // weights)
        packed = self._bytes(stored).view(-1, stored.shape[-1] // weights * num_bytes)
        packed = packed[:, low * num_bytes : high * num_bytes]
        decoded, skipped = (high - low) * weights, first - low * weights
        in_place = decoded == out.shape[1] and out.is_contiguous()
        step = max(_WEIGHTS_AT_ONCE // decoded, 1)
        for i in range(0, len(rows), step):
            chunk, part = rows[i : i + step], out[i : i + step]
            blocks = packed[chunk.start : chunk.stop] if isinstance(chunk, range) else packed[chunk]
            dense = part if in_place else torch.empty(len(part), decoded)
            dequantise(stored.kind, blocks.contiguous().numpy(), dense)
            if not in_place:
                part.copy_(dense[:, skipped : skipped + out.shape[1]])


def _within(start: int, stop: int, length: int) -> tuple[int, int]:
    """The bounds of a slice as `tensor[start:stop]` takes them, cut to the length."""
    start, stop, _ = slice(start, stop).indices(length)
    return start, max(start, stop)


def _chosen(start: int, stop: int, order: Tensor | None) -> slice | Tensor:
    return slice(start, stop) if order is None else order[start:stop]


def _floats(data: Tensor, stored: StoredTensor) -> Tensor:
    return data.view(FLOATS[stored.kind]).view(stored.shape)


def _add(tensor: Tensor, source: TensorSource, stored: StoredTensor) -> Tensor:
    """Add in fp32. What was dequantised is ours, so it is changed in place."""
    if not source.add:
        return tensor
    if stored.kind in FLOATS:
        tensor = tensor.to(torch.float32, copy=True)
    return tensor.add_(source.add)
