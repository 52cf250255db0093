"""What an optimizer step sees, as a pure function of its number.

    batches = Batches(examples, max_tokens=1024, tokens_per_step=32_768, seed=0)
    for i in range(batches.steps):
        for batch in batches.step(i): ...

Going on after an interruption is asking for the next number. A bin is a few whole rows, one behind
the other; a batch is a few bins, padded to the longest. Rows are told apart by their position ids,
which begin again at 0: with `attention_mask=None` and no cache, transformers makes the mask that
keeps rows to themselves out of them. Padding is one more row of a bin, with targets of its own:
none. So no token id has to mean padding.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qlora_lite.data.examples import Example, Examples
from qlora_lite.data.packing import WINDOW, pack_in_windows
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.seeds import generator
from qlora_lite.kernels.cross_entropy import IGNORE_INDEX


@dataclass(frozen=True)
class Bin:
    """Whole rows, one behind the other, each attending to itself only."""

    ids: Tensor
    """(tokens,) int64"""
    targets: Tensor
    """(tokens,) int64: the token to predict at each position, or `IGNORE_INDEX`"""
    position_ids: Tensor
    """(tokens,) int64, from 0 in every row"""
    rows: list[int]
    """Numbers of the rows in their source"""


@dataclass(frozen=True)
class Batch:
    """What one forward sees."""

    input_ids: Tensor
    """(bins, tokens) int64"""
    targets: Tensor
    """(bins, tokens) int64, already shifted: `targets[b, t]` is predicted at position t"""
    position_ids: Tensor
    """(bins, tokens) int64"""
    num_targets: int
    """Trained tokens."""
    num_tokens: int
    """Tokens that are not padding."""
    rows: list[int]
    """Numbers of the rows in their source."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            targets=self.targets.to(device),
            position_ids=self.position_ids.to(device),
        )


def make_bin(examples: Sequence[Example]) -> Bin:
    """Rows laid one behind the other. No row has a target in the next one."""
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
    """Bins below each other. What is missing to the longest becomes a row without targets."""
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


def split_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of bins sorted by length, cut so that a batch, padded, has at most `budget` tokens.

    A bin longer than the budget is a batch of its own.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class Batches:
    """The micro-batches of every optimizer step.

    All steps are of the same size, and step `i` does not depend on how many there are: a run that
    is made longer sees the same rows as one that was meant to be so long.

    Args:
        examples: the rows, none longer than `max_tokens`.
        max_tokens: capacity of a bin.
        tokens_per_step: tokens that a step processes, rounded to whole bins, at least one and at
            most an epoch. Without packing a bin is one row, and counts as long as the rows are on
            average.
        micro_batch_tokens: tokens that a forward sees, padding included; at least one bin.
            Another value changes how a step is cut, never which rows are in it.
        epochs: how often every row is seen, in whole steps: the last one is filled up with rows
            of the next epoch.
        steps: the number of steps instead, with as many epochs as they take.

    Raises:
        DataError: if there are no rows.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        max_tokens: int,
        tokens_per_step: int,
        micro_batch_tokens: int | None = None,
        seed: int = 0,
        packing: bool = True,
        shuffle: bool = True,
        epochs: float = 1.0,
        steps: int | None = None,
    ) -> None:
        if not len(examples):
            raise DataError("there are no rows to train on; look at the data with preview")
        self.examples = examples
        self.max_tokens = max_tokens
        self.micro_batch_tokens = micro_batch_tokens or max_tokens
        self.seed = seed
        self.packing = packing
        self.shuffle = shuffle
        self._lengths = examples.lengths
        self._epoch_bins = lru_cache(maxsize=2)(self._make_epoch)
        self.bins_per_epoch = len(self._epoch_bins(0))
        mean_length = examples.num_tokens / len(examples)
        bins_per_step = round(tokens_per_step / (max_tokens if packing else mean_length))
        self.bins_per_step = min(max(1, bins_per_step), self.bins_per_epoch)
        if steps is None:
            num_bins = max(1, round(self.bins_per_epoch * epochs))
            steps = math.ceil(num_bins / self.bins_per_step)
        self.steps = steps

    def step(self, i: int) -> list[Batch]:
        """The micro-batches of step `i`, from 0; always the same."""
        assert 0 <= i < self.steps, (i, self.steps)
        bins = self._bins(i)
        lengths = [self._length(members) for members in bins]
        return [
            self._batch([bins[k] for k in group])
            for group in split_micro_batches(lengths, self.micro_batch_tokens)
        ]

    def epoch(self, i: int) -> float:
        """How many times the rows were seen when step `i` is done."""
        return (i + 1) * self.bins_per_step / self.bins_per_epoch

    def largest_batch(self) -> Batch:
        """As many tokens as the largest batch of this run, in bins as long as its longest.

        No forward sees more, in any epoch: the bins of all epochs have the same lengths. Of bins
        that are equally long those with the most trained tokens are taken.
        """
        targets = _targets_per_example(self.examples)
        bins = sorted(
            self._epoch_bins(0),
            key=lambda members: (self._length(members), sum(targets[i] for i in members)),
            reverse=True,
        )
        lengths = [self._length(members) for members in bins]
        largest = max(
            length * min(max(1, self.micro_batch_tokens // length), self.bins_per_step)
            for length in lengths
        )
        return self._batch(bins[: -(-largest // lengths[0])])

    def _bins(self, i: int) -> list[list[int]]:
        """Examples in the bins of a step, which may begin in one epoch and end in the next."""
        start = i * self.bins_per_step
        return [
            self._epoch_bins(k // self.bins_per_epoch)[k % self.bins_per_epoch]
            for k in range(start, start + self.bins_per_step)
        ]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        """The bins of an epoch. Rows change places within their window, so that there are as many
        bins in every epoch; the bins are then mixed over all windows."""
        order = torch.arange(len(self.examples))
        if self.shuffle:
            order = _shuffled(order, generator(self.seed, "windows"))
            draw = generator(self.seed, "epoch", epoch)
            order = torch.cat([_shuffled(window, draw) for window in order.split(WINDOW)])
        if self.packing:
            bins = pack_in_windows(order.tolist(), self._lengths, self.max_tokens)
        else:
            bins = [[i] for i in order.tolist()]
        if self.shuffle:
            bins = [bins[i] for i in torch.randperm(len(bins), generator=draw).tolist()]
        return bins

    def _length(self, members: Sequence[int]) -> int:
        return sum(self._lengths[i] for i in members)

    def _batch(self, bins: Sequence[Sequence[int]]) -> Batch:
        return make_batch([make_bin([self.examples[i] for i in members]) for members in bins])


def in_order(
    examples: Examples, *, max_tokens: int, micro_batch_tokens: int, packing: bool = True
) -> Iterator[Batch]:
    """Every row once, for evaluation; the longest bins come first."""
    lengths = examples.lengths
    everything = range(len(examples))
    if packing:
        bins = pack_in_windows(everything, lengths, max_tokens)
    else:
        bins = [[i] for i in everything]
    sizes = [sum(lengths[i] for i in members) for members in bins]
    for group in split_micro_batches(sizes, micro_batch_tokens):
        yield make_batch([make_bin([examples[i] for i in bins[k]]) for k in group])


def _shuffled(values: Tensor, draw: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=draw)]


def _targets_per_example(examples: Examples) -> list[int]:
    """Trained tokens of each example."""
    before = torch.cat([torch.zeros(1, dtype=torch.int64), examples.loss_mask.cumsum(0)])
    return before[examples.offsets].diff().tolist()
