"""Which tensors go into which safetensors file, and at which byte each one ends."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from qlora_lite.shards.reader import DTYPES, SINGLE

MAX_SHARD_BYTES = 5 * 10**9

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One safetensors file and its tensors, in the order in which they are stored."""

    name: str
    specs: tuple[TensorSpec, ...]

    def path(self, directory: Path) -> Path:
        """Where the complete file is."""
        return directory / self.name

    def temporary_path(self, directory: Path) -> Path:
        """Where the file grows until it is complete."""
        return directory / f".{self.name}.writing"

    @cached_property
    def header(self) -> bytes:
        """Its length and its JSON, padded so that the data starts at a multiple of 8 bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for spec in self.specs:
            end = start + spec.num_bytes
            entries[spec.name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def ends(self) -> list[int]:
        """For each tensor the position in the file just after its last byte."""
        position, ends = len(self.header), []
        for spec in self.specs:
            position += spec.num_bytes
            ends.append(position)
        return ends


def split_into_shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[Shard]:
    """Fill shards in order, each up to `max_shard_bytes`; a larger tensor gets its own.

    Inside a shard, wide dtypes come first, so that every tensor is aligned.
    """
    groups: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if groups[-1] and used + spec.num_bytes > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += spec.num_bytes
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [
        Shard(name, tuple(sorted(group, key=lambda spec: -spec.dtype.itemsize)))
        for name, group in zip([SINGLE] if count == 1 else names, groups, strict=True)
    ]
