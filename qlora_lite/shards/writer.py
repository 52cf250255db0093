"""Safetensors shards of bounded size, written tensor by tensor.

    with ShardWriter(directory, specs, identity) as writer:
        for spec in writer.pending:
            writer.write(spec.name, make(spec))          # a tensor, or chunks of its rows

All names, dtypes and shapes are known beforehand, so each shard's header comes first and the
tensors are appended: one tensor, or one chunk of it, is in memory. A shard grows under a hidden
name and gets its own when it is complete and synced. After a kill the same call goes on behind the
last complete tensor; `identity` says that it is the same call.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_lite.foundation.errors import ExportError
from qlora_lite.foundation.files import (
    make_folder,
    require_free_space,
    sync_directory,
    write_json,
)
from qlora_lite.shards.reader import DTYPES, INDEX, SINGLE

MAX_SHARD_BYTES = 5 * 10**9

_JOURNAL = ".shards.writing.json"
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


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A whole new file at once, for those whom the umask lets read it: the library's is private."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(plain, path, {"format": "pt"})
    path.chmod(mode)


class ShardWriter:
    """`model.safetensors`, or `model-0000i-of-0000n.safetensors` and their index.

    Raises:
        ExportError: if the directory holds weights of something else, or the disk is full.
        RunError: if the disk has too little space left for all tensors.
    """

    def __init__(
        self,
        directory: Path,
        specs: Sequence[TensorSpec],
        identity: str,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.directory = directory
        self._shards = _shards(specs, max_shard_bytes)
        self._file: BinaryIO | None = None
        make_folder(directory)
        self._begin(_identity(identity, self._shards))
        missing = sum(spec.num_bytes for spec in self.pending)
        require_free_space(directory, missing, "the model's weights")

    @property
    def pending(self) -> list[TensorSpec]:
        """What is still to be written, in the order to write it in."""
        return [
            spec
            for shard in self._shards
            if not shard.path(self.directory).exists()
            for spec in shard.specs[self._num_complete(shard) :]
        ]

    def write(self, name: str, tensor: Tensor | Iterable[Tensor]) -> None:
        """Append the next pending tensor, whole or as chunks along its first dimension."""
        spec = self.pending[0]
        assert name == spec.name, f"{name} given where {spec.name} is next"
        shard = next(shard for shard in self._shards if spec in shard.specs)
        file = self._file or self._open(shard)
        written = 0
        try:
            for chunk in [tensor] if isinstance(tensor, Tensor) else tensor:
                assert chunk.dtype == spec.dtype, f"{name}: {chunk.dtype}, announced {spec.dtype}"
                flat = chunk.detach().cpu().contiguous().flatten()
                written += file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
        except OSError as error:
            raise _disk_error(self.directory, error) from error
        assert written == spec.num_bytes, f"{name}: {written} bytes, announced {spec.num_bytes}"
        if spec == shard.specs[-1]:
            self._complete(shard)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if kind is None:
            self._finish()

    def _begin(self, identity: str) -> None:
        """Claim the directory, or go on with what the same call left there."""
        journal = self.directory / _JOURNAL
        if journal.exists():
            if json.loads(journal.read_text())["identity"] == identity:
                return
            for path in _weights(self.directory):
                path.unlink()
        elif found := _weights(self.directory):
            raise ExportError(
                f"{self.directory} already holds weights ({found[0].name}), and nothing is "
                "overwritten. Give another directory, or remove it first"
            )
        write_json(journal, {"identity": identity})

    def _num_complete(self, shard: "_Shard") -> int:
        aside = shard.aside(self.directory)
        size = aside.stat().st_size if aside.exists() else 0
        return sum(end <= size for end in shard.ends)

    def _open(self, shard: "_Shard") -> BinaryIO:
        """The shard's file, cut behind its last complete tensor, or begun with its header."""
        aside = shard.aside(self.directory)
        if num_complete := self._num_complete(shard):
            os.truncate(aside, shard.ends[num_complete - 1])
        else:
            aside.write_bytes(shard.header)
        self._file = open(aside, "ab")  # noqa: SIM115 (closed when the shard is complete)
        return self._file

    def _complete(self, shard: "_Shard") -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(shard.aside(self.directory), shard.path(self.directory))
        sync_directory(self.directory)

    def _finish(self) -> None:
        assert not self.pending, f"{len(self.pending)} tensors were not written"
        if len(self._shards) > 1:
            total = sum(spec.num_bytes for shard in self._shards for spec in shard.specs)
            files = {spec.name: shard.name for shard in self._shards for spec in shard.specs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
            write_json(self.directory / INDEX, index)
        (self.directory / _JOURNAL).unlink()
        sync_directory(self.directory)


@dataclass(frozen=True)
class _Shard:
    name: str
    specs: tuple[TensorSpec, ...]

    def path(self, directory: Path) -> Path:
        return directory / self.name

    def aside(self, directory: Path) -> Path:
        return directory / f".{self.name}.writing"

    @cached_property
    def header(self) -> bytes:
        """Length and JSON, padded so that the data begins at a multiple of 8."""
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
        """Where each tensor ends in the file."""
        position, ends = len(self.header), []
        for spec in self.specs:
            position += spec.num_bytes
            ends.append(position)
        return ends


def _shards(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[_Shard]:
    """Filled in order; inside a shard wide types come first, so that all stay aligned."""
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
        _Shard(name, tuple(sorted(group, key=lambda spec: -spec.dtype.itemsize)))
        for name, group in zip([SINGLE] if count == 1 else names, groups, strict=True)
    ]


def _identity(identity: str, shards: Sequence[_Shard]) -> str:
    digest = hashlib.sha256(identity.encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.header)
    return digest.hexdigest()


def _weights(directory: Path) -> list[Path]:
    patterns = ("model*.safetensors", ".model*.safetensors.writing", INDEX)
    return sorted(path for pattern in patterns for path in directory.glob(pattern))


def _disk_error(directory: Path, error: OSError) -> ExportError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
    return ExportError(
        f"writing weights to {directory} stopped: {reason}. What is complete stays; free some "
        "space, and the same command goes on from there"
    )
