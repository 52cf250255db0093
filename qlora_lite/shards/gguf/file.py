"""The header of one GGUF file: its metadata, and where its arrays and tensors are.

Little-endian files of version 2 and 3 (docs/gguf.md of ggml):

    magic, version, number of tensors, number of keys
    for each key:     its name, the type of its value, the value
    for each tensor:  its name, dimensions (fastest first), type, offset in the data
    padding, then the data

Arrays (vocabulary, scores, merges) make up most of a header, so only their places are kept;
`read_array` reads one. A vocabulary of 262,144 tokens takes 0.1 s and no memory.
"""

import itertools
import math
import mmap
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.gguf.types import SUPPORTED, block_size, kind_of

MAGIC = b"GGUF"

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9

_MAX_HEADER_BYTES = 2**28
_MAX_STRING_BYTES = 2**24
_MAX_ENTRIES = 2**16
"""Limits of the header, a string, and the keys and tensors: damaged numbers cost no memory."""

_MAX_DIMENSIONS = 4
_GIT_LFS = b"version https://git-lfs"

_ENDS_EARLY = "it ends inside its header, or a length in its header is wrong"
_DEFAULT_ALIGNMENT = 32

_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
"""MAP_NORESERVE. Without it Linux refuses private maps that are larger than memory and swap."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    name: str
    """As in the file: `blk.0.attn_q.weight`."""

    shape: tuple[int, ...]
    """(rows, columns), as in torch; the file has the reverse."""

    kind: str
    """`Q4_1`, `F32`, ..."""

    file: Path
    offset: int
    """From the start of the file, in bytes."""

    num_bytes: int


@dataclass(frozen=True)
class StoredArray:
    """One array of a file's metadata."""

    type: int
    length: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """What the header of one file says."""

    path: Path
    metadata: Mapping[str, Any]
    """Numbers, booleans and strings."""

    arrays: Mapping[str, StoredArray]
    tensors: Sequence[StoredTensor]
    data_start: int
    """The first byte after the header and its padding."""


def map_file(path: Path) -> mmap.mmap:
    """Map a file. Writes change private copies of pages, never the file.

    Raises:
        BaseModelError: if it cannot be read, or is empty.
    """
    flags, protection = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    try:
        if not path.stat().st_size:
            raise BaseModelError(f"{path} is empty. Download it again")
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=protection)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{path} cannot be read ({error}). Give a GGUF file, or download it again"
        ) from None


def read_file(path: Path) -> GgufFile:
    """Read and check one header.

    Raises:
        BaseModelError: if it is no GGUF file, of another version or byte order, damaged or
            truncated, or has tensors of an unsupported type.
    """
    with map_file(path) as data:
        num_tensors, num_keys = _counts(path, data)
        try:
            return _read(path, data, num_tensors, num_keys)
        except _Damage as error:
            raise BaseModelError(f"{path} is damaged: {error}. Download it again") from None


def read_array(path: Path, key: str, array: StoredArray) -> list[Any]:
    """The values of one array.

    Raises:
        BaseModelError: if a string is not UTF-8, or the file changed.
    """
    with map_file(path) as data:
        try:
            if array.type == _STRING:
                cursor = _Cursor(data, array.offset)
                return [cursor.string() for _ in range(array.length)]
            layout = f"<{array.length}{_SCALARS[array.type][1]}"
            return list(struct.unpack_from(layout, data, array.offset))
        except (_Damage, struct.error) as error:
            raise BaseModelError(
                f"{path} is damaged: {key} cannot be read ({error}). Download it again"
            ) from None


class _Damage(Exception):
    """What is wrong with a file."""


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data = data
        self._stop = min(len(data), _MAX_HEADER_BYTES)
        self.position = position

    def skip(self, num_bytes: int) -> int:
        """Move on; returns where it was."""
        start = self.position
        if num_bytes > self._stop - start:
            raise _Damage(_ENDS_EARLY)
        self.position += num_bytes
        return start

    def number(self, layout: str) -> Any:
        return struct.unpack_from(layout, self._data, self.skip(struct.calcsize(layout)))[0]

    def string(self) -> str:
        length = self.number("<Q")
        if length > _MAX_STRING_BYTES:
            raise _Damage(_ENDS_EARLY)
        start = self.skip(length)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError:
            raise _Damage(f"the string at byte {start:,} is not UTF-8") from None

    def array(self) -> StoredArray:
        """The place of an array; moves behind it."""
        kind, length = self.number("<I"), self.number("<Q")
        array = StoredArray(kind, length, self.position)
        if kind == _STRING:
            self._skip_strings(length)
        elif kind in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            raise _Damage(f"an array at byte {array.offset:,} has the unknown type {kind}")
        return array

    def _skip_strings(self, count: int) -> None:
        unpack, data = struct.Struct("<Q").unpack_from, self._data
        position, last = self.position, self._stop - 8
        for _ in range(count):
            if position > last:
                raise _Damage(_ENDS_EARLY)
            position += 8 + unpack(data, position)[0]
        self.skip(position - self.position)


def _counts(path: Path, data: mmap.mmap) -> tuple[int, int]:
    """The numbers of tensors and keys, after the checks of magic, version and byte order."""
    if data[: len(_GIT_LFS)] == _GIT_LFS:
        raise BaseModelError(
            f"{path} is a pointer of Git LFS, not the file itself. Run `git lfs pull` in its folder"
        )
    if data[:4] != MAGIC:
        raise BaseModelError(
            f"{path} is not a GGUF file: its first bytes are {data[:4]!r}, not {MAGIC!r}. "
            "Give a GGUF file, or download it again"
        )
    if len(data) < 24:
        raise BaseModelError(f"{path} is damaged: {_ENDS_EARLY}. Download it again")
    version, num_tensors, num_keys = struct.unpack_from("<IQQ", data, 4)
    if version in (2, 3):
        return num_tensors, num_keys
    if version and not version & 0xFFFF:
        found = "big-endian"
    else:
        found = f"of version {version}"
    raise BaseModelError(
        f"{path} is {found}, and little-endian GGUF files of version 2 or 3 are read. "
        "Use another file of this model, or convert it again with llama.cpp"
    )


def _read(path: Path, data: mmap.mmap, num_tensors: int, num_keys: int) -> GgufFile:
    if max(num_tensors, num_keys) > _MAX_ENTRIES:
        raise _Damage(f"it claims {num_tensors:,} tensors and {num_keys:,} keys")
    cursor = _Cursor(data, 24)
    metadata, arrays = _read_metadata(cursor, num_keys)
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise _Damage(f"general.alignment is {alignment!r}, not a multiple of 8")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = [_tensor(path, entry, data_start, alignment) for entry in entries]
    _require_adjacent(tensors, alignment)
    for tensor in tensors:
        end = tensor.offset + tensor.num_bytes
        if end > len(data):
            raise _Damage(f"{tensor.name} ends at byte {end:,}, and the file at {len(data):,}")
    return GgufFile(path, metadata, arrays, tensors, data_start)


def _read_metadata(cursor: _Cursor, num_keys: int) -> tuple[dict[str, Any], dict[str, StoredArray]]:
    metadata: dict[str, Any] = {}
    arrays: dict[str, StoredArray] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if not key or key in metadata or key in arrays:
            raise _Damage(f"the key {key!r} is empty or not unique")
        kind = cursor.number("<I")
        if kind == _ARRAY:
            arrays[key] = cursor.array()
        elif kind == _STRING:
            metadata[key] = cursor.string()
        elif kind in _SCALARS:
            metadata[key] = cursor.number(_SCALARS[kind])
        else:
            raise _Damage(f"{key!r} has the unknown type {kind}")
    return metadata, arrays


@dataclass(frozen=True)
class _Entry:
    """A tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]
    number: int
    offset: int


def _read_entry(cursor: _Cursor) -> _Entry:
    name, num_dimensions = cursor.string(), cursor.number("<I")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise _Damage(f"the tensor {name!r} has {num_dimensions:,} dimensions")
    dimensions = [cursor.number("<Q") for _ in range(num_dimensions)]
    return _Entry(name, tuple(reversed(dimensions)), cursor.number("<I"), cursor.number("<Q"))


def _tensor(path: Path, entry: _Entry, data_start: int, alignment: int) -> StoredTensor:
    kind = kind_of(entry.number)
    if kind not in SUPPORTED:
        raise BaseModelError(
            f"{path}: the tensor {entry.name!r} has the type {kind}. Supported are "
            f"{', '.join(SUPPORTED)}. Use another file of this model"
        )
    weights, num_bytes = block_size(kind)
    if not entry.name or 0 in entry.shape or entry.shape[-1] % weights or entry.offset % alignment:
        raise _Damage(
            f"the tensor {entry.name!r} of type {kind} has the shape {entry.shape} and the offset "
            f"{entry.offset:,}"
        )
    size = math.prod(entry.shape) // weights * num_bytes
    return StoredTensor(entry.name, entry.shape, kind, path, data_start + entry.offset, size)


def _require_adjacent(tensors: Sequence[StoredTensor], alignment: int) -> None:
    """Check that names are unique, and that between two tensors is only padding.

    A wrong type or shape leaves a gap, or shares bytes with the next tensor.
    """
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise _Damage(f"it has two tensors {tensor.name!r}")
        names.add(tensor.name)
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(ordered):
        gap = after.offset - before.offset - before.num_bytes
        if gap < 0:
            raise _Damage(f"the tensors {before.name!r} and {after.name!r} overlap")
        if gap >= alignment:
            raise _Damage(
                f"{gap:,} bytes are unused between the tensors {before.name!r} of type "
                f"{before.kind} and {after.name!r}, so a type or a shape is wrong"
            )
