"""Tokenised rows in four flat tensors: 5 bytes per token, for any number of rows."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One row, or a piece of one."""

    ids: Tensor
    """(tokens,) int32"""
    loss_mask: Tensor
    """(tokens,) bool: which tokens are trained. The first one is not: nothing predicts it."""
    row: int
    """Number of the row in its source."""


@dataclass(frozen=True)
class Examples:
    """Many examples: example i has the tokens offsets[i] to offsets[i + 1]."""

    ids: Tensor
    """(all tokens,) int32"""
    loss_mask: Tensor
    """(all tokens,) bool"""
    offsets: Tensor
    """(examples + 1,) int64"""
    rows: Tensor
    """(examples,) int64: number of the row in its source"""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        start, stop = self.offsets[index : index + 2].tolist()
        return Example(
            self.ids[start:stop], self.loss_mask[start:stop], int(self.rows[index].item())
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.offsets.diff().tolist()

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Tokens that are trained."""
        return int(self.loss_mask.sum())

    def select(self, indices: Sequence[int]) -> "Examples":
        """Some of the examples. `indices` are in increasing order."""
        is_kept = torch.zeros(len(self), dtype=torch.bool)
        is_kept[list(indices)] = True
        lengths = self.offsets.diff()
        # numpy: indexing with a mask in torch needs 8 more bytes per token
        tokens = np.repeat(is_kept.numpy(), lengths.numpy())
        return Examples(
            torch.from_numpy(self.ids.numpy()[tokens]),
            torch.from_numpy(self.loss_mask.numpy()[tokens]),
            torch.cat([self.offsets[:1], lengths[is_kept].cumsum(0)]),
            self.rows[is_kept],
        )


class ExamplesBuilder:
    """Collects examples one by one."""

    def __init__(self) -> None:
        self._ids, self._loss_mask = array("i"), bytearray()
        self._offsets, self._rows = array("q", [0]), array("q")

    def add(self, ids: Sequence[int], loss_mask: Sequence[bool], row: int) -> None:
        """Append one example."""
        self._ids.extend(ids)
        self._loss_mask.extend(loss_mask)
        self._offsets.append(len(self._ids))
        self._rows.append(row)

    def build(self) -> Examples:
        """All examples added so far."""
        return Examples(
            _tensor(self._ids, torch.int32),
            _tensor(self._loss_mask, torch.bool),
            _tensor(self._offsets, torch.int64),
            _tensor(self._rows, torch.int64),
        )


def _tensor(values: array | bytearray, dtype: torch.dtype) -> Tensor:
    """A tensor over the same memory."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
