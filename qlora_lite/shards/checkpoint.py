"""What every reader of stored weights offers: names, shapes, and one tensor or slice at a time."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.fingerprint import hash_of_all


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, as it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    file: Path


class Checkpoint(ABC):
    """The tensors of a model, under the names that transformers gives them.

    `read`, `rows` and `columns` may return read-only views of a memory map: copy what you keep.

    Args:
        files: all files of the weights.
        infos: of all tensors, file by file, in the order of their bytes.
    """

    def __init__(self, files: list[Path], infos: Iterable[TensorInfo]) -> None:
        self.files = files
        self._infos = {info.name: info for info in infos}

    @property
    def names(self) -> list[str]:
        """All tensor names, file by file, in the order of their bytes."""
        return list(self._infos)

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors as they are read."""
        return sum(info.num_bytes for info in self._infos.values())

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Raises BaseModelError if there is no such tensor."""
        if name not in self._infos:
            raise BaseModelError(
                f"{self.files[0]} has no tensor {name!r}. The checkpoint is incomplete, or its "
                "config belongs to another architecture: download it again"
            )
        return self._infos[name]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, headers and samples: quick for any size."""

    @functools.cached_property
    def full_hash(self) -> str:
        """SHA-256 of names and all bytes: about a second per GB."""
        return hash_of_all(self.files)

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A whole tensor."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor[start:stop]`."""

    @abstractmethod
    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor[:, start:stop]`, not contiguous."""

    @abstractmethod
    def close(self) -> None:
        """Release the memory maps; the next read opens them again."""
