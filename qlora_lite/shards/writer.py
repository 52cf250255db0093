"""Safetensors shards of bounded size, written tensor by tensor.

    with ShardWriter(directory, specs, identity) as writer:
        for spec in writer.pending:
            writer.write(spec.name, make(spec))          # a tensor, or chunks of its rows

All names, dtypes and shapes are known beforehand, so each shard starts with its header and tensors
are appended: at most one tensor, or one chunk of it, is in memory. A shard grows under a hidden
name; when it is complete and synced it is renamed.

A hidden journal records the hash of each shard up to the end of every tensor. After a kill, a call
with the same specs and the same `identity` (a hash of what the tensors are made from) reads back
what is there and continues after the last tensor whose hash is right. At the end every file is
read back and compared with its hash. The journal stays; `resumable_directory` deletes it.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_lite.foundation.errors import ExportError
from qlora_lite.foundation.files import (
    file_hash,
    make_folder,
    parse_json,
    require_free_space,
    sync_directory,
    write_json,
    write_text,
)
from qlora_lite.foundation.json_files import JsonFile, check_as
from qlora_lite.shards.layout import MAX_SHARD_BYTES, Shard, TensorSpec, split_into_shards
from qlora_lite.shards.reader import INDEX, SafetensorsCheckpoint

_JOURNAL = ".shards.jsonl"
_READ_BYTES = 2**20


class _FirstLine(JsonFile):
    """The first line of the journal."""

    identity: str


class _Line(JsonFile):
    """A line of the journal: the hash of a shard up to the end of a tensor."""

    file: str
    end: int
    sha256: str


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
        ExportError: if the directory already holds other weights, the disk is full, or a file does
            not hold what was written to it.
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
        self.hashes: dict[str, str] = {}
        """SHA-256 of every complete file, by name."""
        self._shards = split_into_shards(specs, max_shard_bytes)
        self._file: BinaryIO | None = None
        self._digests: dict[str, Any] = {}
        """SHA-256 of each shard so far."""
        self._num_complete: dict[str, int] = {}
        """Complete tensors of each shard."""
        make_folder(directory)
        self._resume(_identity(identity, self._shards))
        missing = sum(spec.num_bytes for spec in self.pending)
        require_free_space(directory, missing, "the model's weights")

    @property
    def pending(self) -> list[TensorSpec]:
        """The tensors that are still missing, in the order in which `write` takes them."""
        return [
            spec for shard in self._shards for spec in shard.specs[self._num_complete[shard.name] :]
        ]

    def write(self, name: str, tensor: Tensor | Iterable[Tensor]) -> None:
        """Append the next pending tensor, as one tensor or as chunks of its rows."""
        spec = self.pending[0]
        assert name == spec.name, f"got {name}, the next one is {spec.name}"
        shard = next(shard for shard in self._shards if spec in shard.specs)
        written = 0
        try:
            file = self._file or self._open(shard)
            for chunk in [tensor] if isinstance(tensor, Tensor) else tensor:
                assert chunk.dtype == spec.dtype, f"{name}: {chunk.dtype}, specified {spec.dtype}"
                flat = chunk.detach().cpu().contiguous().flatten()
                data = flat.view(torch.uint8).numpy().data
                self._digests[shard.name].update(data)
                written += file.write(data)
            file.flush()
            assert written == spec.num_bytes, f"{name}: {written} bytes, not {spec.num_bytes}"
            self._record(shard)
            if spec == shard.specs[-1]:
                os.fsync(file.fileno())
                self._complete(shard)
        except OSError as error:
            raise _disk_error(self.directory, error) from error

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        if kind is None:
            self._finish()

    def _resume(self, identity: str) -> None:
        """Continue the work of the same call. Start a journal if there is none."""
        journal = self.directory / _JOURNAL
        recorded, lines = _read_journal(journal)
        if recorded == identity:
            write_text(journal, _first_line(identity) + "".join(map(_line, lines)))
            for shard in self._shards:
                self._num_complete[shard.name] = self._resume_shard(shard, lines)
            return
        found = _weights(self.directory)
        if found and not journal.exists():
            raise ExportError(
                f"{self.directory} already holds weights ({found[0].name}), which are not "
                "overwritten. Give another directory, or remove it first"
            )
        for path in found:
            path.unlink()
        write_text(journal, _first_line(identity))
        self._num_complete = {shard.name: 0 for shard in self._shards}

    def _resume_shard(self, shard: Shard, lines: Sequence[_Line]) -> int:
        """The number of its tensors that are complete. A complete shard is renamed."""
        path, temporary = shard.path(self.directory), shard.temporary_path(self.directory)
        if path.exists():
            os.replace(path, temporary)  # read back below, like an incomplete one
        if not temporary.exists():
            return 0
        recorded = {line.end: line.sha256 for line in lines if line.file == shard.name}
        count, self._digests[shard.name] = _matching(temporary, shard, recorded)
        if count < len(shard.specs):
            return count
        os.truncate(temporary, shard.ends[-1])
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        self._complete(shard)
        return count

    def _open(self, shard: Shard) -> BinaryIO:
        """The shard's file: truncated after its last complete tensor, or new with its header."""
        temporary, count = shard.temporary_path(self.directory), self._num_complete[shard.name]
        if count:
            os.truncate(temporary, shard.ends[count - 1])
        else:
            temporary.write_bytes(shard.header)
            self._digests[shard.name] = hashlib.sha256(shard.header)
        self._file = open(temporary, "ab")  # noqa: SIM115 (closed when the shard is complete)
        return self._file

    def _record(self, shard: Shard) -> None:
        """Add the hash up to the end of the tensor that was just written to the journal."""
        end = shard.ends[self._num_complete[shard.name]]
        line = _Line(file=shard.name, end=end, sha256=self._digests[shard.name].hexdigest())
        with open(self.directory / _JOURNAL, "a", encoding="utf-8") as file:
            file.write(_line(line))
        self._num_complete[shard.name] += 1

    def _complete(self, shard: Shard) -> None:
        """Rename the synced file of a complete shard."""
        self._close()
        self.hashes[shard.name] = self._digests[shard.name].hexdigest()
        os.replace(shard.temporary_path(self.directory), shard.path(self.directory))
        sync_directory(self.directory)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _finish(self) -> None:
        """Write the index, and read every file back."""
        assert not self.pending, f"{len(self.pending)} tensors were not written"
        if len(self._shards) > 1:
            total = sum(spec.num_bytes for shard in self._shards for spec in shard.specs)
            files = {spec.name: shard.name for shard in self._shards for spec in shard.specs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
            write_json(self.directory / INDEX, index)
        for shard in self._shards:
            path = shard.path(self.directory)
            if not path.is_file() or file_hash(path) != self.hashes[shard.name]:
                raise ExportError(
                    f"{path} does not hold what was written to it. Check the disk, remove "
                    f"{self.directory} and run the same command again"
                )
        checkpoint = SafetensorsCheckpoint.open(self.directory)
        for spec in (spec for shard in self._shards for spec in shard.specs):
            found = checkpoint.info(spec.name)
            assert (found.dtype, found.shape) == (spec.dtype, spec.shape), f"{found}, not {spec}"


def _first_line(identity: str) -> str:
    return _line(_FirstLine(identity=identity))


def _line(record: JsonFile) -> str:
    return json.dumps(record.model_dump()) + "\n"


def _read_journal(path: Path) -> tuple[str | None, list[_Line]]:
    """The identity of a journal, and its lines up to the first one that is damaged."""
    lines: list[_Line] = []
    if not path.is_file():
        return None, lines
    first, *others = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    try:
        identity = check_as(_parsed(first), _FirstLine).identity
    except ValueError:
        return None, lines
    with suppress(ValueError):
        for text in others:
            lines.append(check_as(_parsed(text), _Line))
    return identity, lines


def _parsed(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("a line is not an object")
    return value


def _matching(path: Path, shard: Shard, recorded: Mapping[int, str]) -> tuple[int, Any]:
    """Read a shard's file. Returns the number of its first tensors whose bytes have the recorded
    hash, and the digest up to the end of the last of them."""
    digest, position = hashlib.sha256(shard.header), len(shard.header)
    with open(path, "rb") as file:
        if file.read(position) != shard.header:
            return 0, digest
        for count, end in enumerate(shard.ends):
            longer = digest.copy()
            while position < end and (data := file.read(min(_READ_BYTES, end - position))):
                longer.update(data)
                position += len(data)
            if position < end or recorded.get(end) != longer.hexdigest():
                return count, digest
            digest = longer
    return len(shard.ends), digest


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
