"""Concatenate rows into bins, and stack bins into a batch.

    bin: a few complete rows, one after the other; position ids restart at 0 in each row
    batch: a few bins, padded to the longest

Without a cache and with `attention_mask=None`, transformers derives a block-diagonal causal mask
from the position ids, so attention stays within each row. Padding is one more row of the bin,
whose targets are all `IGNORE_INDEX`: no token id has to be reserved for it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.data.examples import Example
from qlora_lite.kernels.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class Bin:
    """Complete rows, one after the other. Attention stays within each row."""

    ids: Tensor
    """(tokens,) int64"""
    targets: Tensor
    """(tokens,) int64: the token to predict at each position, or `IGNORE_INDEX`."""
    position_ids: Tensor
    """(tokens,) int64, starting at 0 in every row."""
    rows: list[int]
    """Numbers of the rows in their source."""


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass."""

    input_ids: Tensor
    """(bins, tokens) int64"""
    targets: Tensor
    """(bins, tokens) int64, already shifted: `targets[b, t]` is predicted at position t."""
    position_ids: Tensor
    """(bins, tokens) int64"""
    num_targets: int
    """Number of trained tokens."""
    num_tokens: int
    """Number of tokens that are not padding."""
    rows: list[int]
    """Numbers of the rows in their source."""
    number: int = 0
    """Position among the batches of its step."""

    @property
    def is_filler(self) -> bool:
        """Whether it has no rows, and only keeps a process in step with the others."""
        return not self.rows

    def to(self, device: torch.device | str) -> "Batch":
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            position_ids=self.position_ids.to(device),
        )


def make_bin(examples: Sequence[Example]) -> Bin:
    """Concatenate rows. The last token of a row has no target."""
    targets = []
    for example in examples:
        shifted = torch.full((len(example.ids),), IGNORE_INDEX)
        shifted[:-1] = torch.where(example.loss_mask[1:], example.ids[1:].long(), IGNORE_INDEX)
        targets.append(shifted)
    return Bin(
        torch.cat([example.ids.long() for example in examples]),
        torch.cat(targets),
        torch.cat([torch.arange(len(example.ids)) for example in examples]),
        [example.row for example in examples],
    )


def make_batch(bins: Sequence[Bin]) -> Batch:
    """Stack bins, padded to the longest with a row without targets."""
    longest = max(len(b.ids) for b in bins)
    input_ids = torch.zeros(len(bins), longest, dtype=torch.int64)
    targets = torch.full((len(bins), longest), IGNORE_INDEX)
    position_ids = torch.zeros(len(bins), longest, dtype=torch.int64)
    for i, b in enumerate(bins):
        n = len(b.ids)
        input_ids[i, :n] = b.ids
        targets[i, :n] = b.targets
        position_ids[i, :n] = b.position_ids
        position_ids[i, n:] = torch.arange(longest - n)
    return Batch(
        input_ids,
        targets,
        position_ids,
        num_targets=int((targets != IGNORE_INDEX).sum()),
        num_tokens=sum(len(b.ids) for b in bins),
        rows=[row for b in bins for row in b.rows],
    )


def filler() -> Batch:
    """The smallest batch without a target, for a process that has fewer batches than another:
    under ZeRO all processes run the same number of forwards."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return Batch(
        ids, torch.full_like(ids, IGNORE_INDEX), torch.tensor([[0, 1]]), 0, num_tokens=0, rows=[]
    )
