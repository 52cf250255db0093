"""What every reader of stored weights offers: names, shapes, and one tensor or slice at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, as it is read."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    file: Path


class Checkpoint(Protocol):
    """The tensors of a model, under the names that transformers gives them.

    `read`, `rows` and `columns` may return read-only views of a memory map: copy what you keep.
    """

    @property
    def files(self) -> list[Path]:
        """All files of the weights."""

    @property
    def names(self) -> list[str]:
        """All tensor names, file by file, in the order of their bytes."""

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors as they are read."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, headers and samples: quick for any size."""

    @property
    def full_hash(self) -> str:
        """SHA-256 of names and all bytes: about a second per GB."""

    def __contains__(self, name: str) -> bool: ...

    def info(self, name: str) -> TensorInfo:
        """Raises BaseModelError if there is no such tensor."""

    def read(self, name: str) -> Tensor:
        """A whole tensor."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor[start:stop]`."""

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor[:, start:stop]`, not contiguous."""

    def close(self) -> None:
        """Release the memory maps; the next read opens them again."""
