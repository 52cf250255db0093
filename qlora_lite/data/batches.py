"""The micro-batches of each optimizer step, as a pure function of the step's number.

    batches = Batches(examples, max_tokens=1024, tokens_per_step=32_768, seed=0)
    for i in range(batches.steps):
        for batch in batches.step(i): ...

A resumed run asks for the next number: there is no iterator state to save.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qlora_lite.data.collate import Batch, filler, make_batch, make_bin
from qlora_lite.data.examples import Examples
from qlora_lite.data.packing import WINDOW, pack_in_windows
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.processes import Processes
from qlora_lite.foundation.seeds import generator


def split_micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group bins, sorted by length, so that a padded batch has at most `budget` tokens.

    Returns indices into `lengths`. A bin longer than the budget is a batch of its own.
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

    All steps have the same number of bins, and step `i` does not depend on the number of steps: an
    extended run sees the same rows as one that had this length from the start.

    Args:
        examples: the rows, none longer than `max_tokens`.
        max_tokens: capacity of a bin.
        tokens_per_step: tokens of an optimizer step, rounded to whole bins: at least one bin, at
            most an epoch. Without packing a bin is one row, and counts with the mean length.
        micro_batch_tokens: tokens of a forward pass, padding included; at least one bin. It
            changes how a step is split, never which rows are in it.
        epochs: how often every row is seen, rounded up to whole steps: the last step is filled
            with rows of the next epoch.
        steps: the number of steps, instead of `epochs`.

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
            raise DataError("there are no rows to train on. Look at the data with preview")
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
        """The micro-batches of step `i`, counted from 0."""
        assert 0 <= i < self.steps, (i, self.steps)
        bins = self._bins(i)
        lengths = [self._length(members) for members in bins]
        return [
            dataclasses.replace(self._batch([bins[k] for k in group]), number=number)
            for number, group in enumerate(split_micro_batches(lengths, self.micro_batch_tokens))
        ]

    def epoch(self, i: int) -> float:
        """How many epochs are done after step `i`."""
        return (i + 1) * self.bins_per_step / self.bins_per_epoch

    def largest_batch(self) -> Batch:
        """A batch that needs at least as much memory as any batch of this run.

        It has as many tokens as the largest batch, in bins as long as the longest bin. This covers
        every epoch, because the bins of all epochs have the same lengths. Among bins of equal
        length, those with the most trained tokens are used.
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
        """The examples of each bin of a step. A step may start in one epoch and end in the next."""
        start = i * self.bins_per_step
        return [
            self._epoch_bins(k // self.bins_per_epoch)[k % self.bins_per_epoch]
            for k in range(start, start + self.bins_per_step)
        ]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        """The examples of each bin of an epoch.

        Rows are shuffled within fixed windows, so that every epoch has the same number of bins;
        then the bins of all windows are shuffled.
        """
        order = torch.arange(len(self.examples))
        if self.shuffle:
            order = _shuffled(order, generator(self.seed, "windows"))
            rng = generator(self.seed, "epoch", epoch)
            order = torch.cat([_shuffled(window, rng) for window in order.split(WINDOW)])
        if self.packing:
            bins = pack_in_windows(order.tolist(), self._lengths, self.max_tokens)
        else:
            bins = [[i] for i in order.tolist()]
        if self.shuffle:
            bins = [bins[i] for i in torch.randperm(len(bins), generator=rng).tolist()]
        return bins

    def _length(self, members: Sequence[int]) -> int:
        return sum(self._lengths[i] for i in members)

    def _batch(self, bins: Sequence[Sequence[int]]) -> Batch:
        return make_batch([make_bin([self.examples[i] for i in members]) for members in bins])


def evaluation_batches(
    examples: Examples, *, max_tokens: int, micro_batch_tokens: int, packing: bool = True
) -> Iterator[Batch]:
    """Batches for evaluation: every row once, the longest bins first."""
    lengths = examples.lengths
    all_rows = range(len(examples))
    if packing:
        bins = pack_in_windows(all_rows, lengths, max_tokens)
    else:
        bins = [[i] for i in all_rows]
    sizes = [sum(lengths[i] for i in members) for members in bins]
    for group in split_micro_batches(sizes, micro_batch_tokens):
        yield make_batch([make_bin([examples[i] for i in bins[k]]) for k in group])


def share_of(batches: Sequence[Batch], processes: Processes) -> list[Batch]:
    """The batches of one process, filled up so that every process has the same number."""
    mine = list(processes.share(batches))
    longest = -(-len(batches) // processes.world)
    return mine + [filler() for _ in range(longest - len(mine))]


def _shuffled(values: Tensor, rng: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=rng)]


def _targets_per_example(examples: Examples) -> list[int]:
    """The number of trained tokens of each example."""
    before = torch.cat([torch.zeros(1, dtype=torch.int64), examples.loss_mask.cumsum(0)])
    return before[examples.offsets].diff().tolist()
