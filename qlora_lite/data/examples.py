"""Tokenised rows in four flat tensors: 5 bytes per token, for any number of rows."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
        """Some of the examples, in the order given."""
        # few slices, since most neighbours stay together: one per example needs 300 bytes of each
        spans = [slice(*self.offsets[[first, stop]].tolist()) for first, stop in _runs(indices)]
        lengths = self.offsets.diff()[list(indices)]
        return Examples(
            torch.cat([self.ids[:0], *(self.ids[span] for span in spans)]),
            torch.cat([self.loss_mask[:0], *(self.loss_mask[span] for span in spans)]),
            torch.cat([self.offsets[:1], lengths.cumsum(0)]),
            self.rows[list(indices)],
        )


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and end of every run of consecutive numbers."""
    first = stop = None
    for index in indices:
        if index != stop:
            if first is not None and stop is not None:
                yield first, stop
            first = index
        stop = index + 1
    if first is not None and stop is not None:
        yield first, stop


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
