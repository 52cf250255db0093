"""Safetensors shards of bounded size, written tensor by tensor.

    with ShardWriter(directory, specs, identity) as writer:
        for spec in writer.pending:
            writer.write(spec.name, make(spec))          # a tensor, or chunks of its rows

All names, dtypes and shapes are known beforehand, so each shard starts with its header and tensors
are appended: at most one tensor, or one chunk of it, is in memory. A shard grows under a hidden
name; when it is complete and synced it is renamed. After a kill, a call with the same specs and
the same `identity` (a hash of what the tensors are made from) continues after the last complete
tensor.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
from qlora_lite.foundation.json_files import JsonFile, Malformed, read_as
from qlora_lite.shards.layout import MAX_SHARD_BYTES, Shard, TensorSpec, split_into_shards
from qlora_lite.shards.reader import INDEX

_JOURNAL = ".shards.writing.json"


class _Journal(JsonFile):
    identity: str


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one new safetensors file, with the permissions of the umask.

    `save_file` alone would create a file that only its owner can read.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(plain, path, {"format": "pt"})
    path.chmod(mode)


class ShardWriter:
    """`model.safetensors`, or `model-0000i-of-0000n.safetensors` and their index.

    Raises:
        ExportError: if the directory already holds other weights, or the disk is full.
        RunError: if the disk has too little free space for all tensors.
    """

    def __init__(
        self,
        directory: Path,
        specs: Sequence[TensorSpec],
        identity: str,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.directory = directory
        self._shards = split_into_shards(specs, max_shard_bytes)
        self._file: BinaryIO | None = None
        make_folder(directory)
        self._claim(_identity(identity, self._shards))
        missing = sum(spec.num_bytes for spec in self.pending)
        require_free_space(directory, missing, "the model's weights")

    @property
    def pending(self) -> list[TensorSpec]:
        """The tensors that are still missing, in the order in which `write` takes them."""
        return [
            spec
            for shard in self._shards
            if not shard.path(self.directory).exists()
            for spec in shard.specs[self._num_complete(shard) :]
        ]

    def write(self, name: str, tensor: Tensor | Iterable[Tensor]) -> None:
        """Append the next pending tensor, as one tensor or as chunks of its rows."""
        spec = self.pending[0]
        assert name == spec.name, f"got {name}, the next one is {spec.name}"
        shard = next(shard for shard in self._shards if spec in shard.specs)
        file = self._file or self._open(shard)
        written = 0
        try:
            for chunk in [tensor] if isinstance(tensor, Tensor) else tensor:
                assert chunk.dtype == spec.dtype, f"{name}: {chunk.dtype}, specified {spec.dtype}"
                flat = chunk.detach().cpu().contiguous().flatten()
                written += file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
        except OSError as error:
            raise _disk_error(self.directory, error) from error
        assert written == spec.num_bytes, f"{name}: {written} bytes, specified {spec.num_bytes}"
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

    def _claim(self, identity: str) -> None:
        """Start a journal, unless the same call left one: then its work is continued."""
        journal = self.directory / _JOURNAL
        if journal.exists():
            with suppress(Malformed):  # written by a killed process: start again
                if read_as(journal, _Journal).identity == identity:
                    return
            for path in _weights(self.directory):
                path.unlink()
        elif found := _weights(self.directory):
            raise ExportError(
                f"{self.directory} already holds weights ({found[0].name}), which are not "
                "overwritten. Give another directory, or remove it first"
            )
        write_json(journal, {"identity": identity})

    def _num_complete(self, shard: Shard) -> int:
        temporary = shard.temporary_path(self.directory)
        size = temporary.stat().st_size if temporary.exists() else 0
        return sum(end <= size for end in shard.ends)

    def _open(self, shard: Shard) -> BinaryIO:
        """The shard's file: truncated after its last complete tensor, or new with its header."""
        temporary = shard.temporary_path(self.directory)
        if num_complete := self._num_complete(shard):
            os.truncate(temporary, shard.ends[num_complete - 1])
        else:
            temporary.write_bytes(shard.header)
        self._file = open(temporary, "ab")  # noqa: SIM115 (closed when the shard is complete)
        return self._file

    def _complete(self, shard: Shard) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(shard.temporary_path(self.directory), shard.path(self.directory))
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


def _identity(identity: str, shards: Sequence[Shard]) -> str:
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
        f"writing weights to {directory} stopped: {reason}. Complete tensors are kept. Free some "
        "space and run the same command again to continue"
    )
