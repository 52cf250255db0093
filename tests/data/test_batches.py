"""The batches of each step: reproducible, of bounded size, every row once per epoch."""

import dataclasses
from collections import Counter
from functools import partial

import pytest
import torch

from qlora_lite.data import batches as module
from qlora_lite.data.batches import (
    Batches,
    evaluation_batches,
    share_of,
    split_micro_batches,
)
from qlora_lite.data.collate import filler
from qlora_lite.data.examples import Examples, ExamplesBuilder
from qlora_lite.data.packing import pack_in_windows
from qlora_lite.foundation.errors import DataError
from qlora_lite.foundation.processes import Processes
from tests.data.random_rows import random_examples


def batches(examples: Examples, **options) -> Batches:
    return Batches(examples, **{"max_tokens": 64, "tokens_per_step": 256, "seed": 0} | options)


def rows_of(step) -> list[int]:
    return sorted(row for batch in step for row in batch.rows)


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.position_ids, b.position_ids)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_sees_every_row_once_in_a_new_order(packing):
    examples = random_examples(100)
    run = batches(examples, packing=packing, epochs=3, tokens_per_step=1)
    steps = [run.step(i) for i in range(run.steps)]
    assert Counter(row for step in steps for row in rows_of(step)) == dict.fromkeys(range(100), 3)
    per_epoch = [run._epoch_bins(e) for e in range(3)]
    assert len({len(bins) for bins in per_epoch}) == 1
    assert per_epoch[0] != per_epoch[1] != per_epoch[2]
    assert run.epoch(run.steps - 1) == 3


def windows_of(seed):
    """Sets of rows that are packed with each other in some epoch."""
    run, found = batches(random_examples(100), seed=seed), []
    for members in (set(members) for epoch in range(20) for members in run._epoch_bins(epoch)):
        joined = members.union(*(window for window in found if window & members))
        found = [window for window in found if not window & members] + [joined]
    return {frozenset(window) for window in found}


def test_rows_stay_in_windows_that_depend_on_the_seed(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 20)
    monkeypatch.setattr(module, "pack_in_windows", partial(pack_in_windows, window=20))
    first, second = windows_of(0), windows_of(1)
    assert max(map(len, first)) <= 20
    assert first != second


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_does_not_depend_on_the_order_of_the_calls(packing):
    examples = random_examples(100)
    run = batches(examples, packing=packing, epochs=4)
    forward = [run.step(i) for i in range(run.steps)]
    fresh = batches(examples, packing=packing, epochs=4)
    for i in reversed(range(fresh.steps)):
        assert same(fresh.step(i), forward[i])
    another = batches(examples, packing=packing, epochs=4, seed=1)
    assert not same(another.step(0), forward[0])


@pytest.mark.parametrize("packing", [True, False])
def test_smaller_micro_batches_split_the_same_rows_further(packing):
    examples = random_examples(100)
    large = batches(examples, packing=packing, micro_batch_tokens=256)
    small = batches(examples, packing=packing, micro_batch_tokens=64)
    assert large.steps == small.steps
    for i in range(large.steps):
        assert rows_of(large.step(i)) == rows_of(small.step(i))
    assert len(small.step(0)) > len(large.step(0))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [1, 70, 160, 250])
@pytest.mark.parametrize("num_rows", [100, 16, 3])
def test_no_batch_exceeds_its_limit_or_the_largest_batch(packing, micro_batch_tokens, num_rows):
    run = batches(
        random_examples(num_rows), packing=packing, micro_batch_tokens=micro_batch_tokens, epochs=30
    )
    largest_batch = run.largest_batch().input_ids
    for i in range(run.steps):
        for batch in run.step(i):
            width = batch.input_ids.shape[1]
            assert batch.input_ids.numel() <= max(micro_batch_tokens, width)
            assert batch.input_ids.numel() <= largest_batch.numel()
            assert width <= largest_batch.shape[1]
    assert largest_batch.numel() <= max(micro_batch_tokens, 64) + largest_batch.shape[1]


def test_among_equally_long_bins_the_largest_batch_has_the_most_trained_tokens():
    builder = ExamplesBuilder()
    for row in range(20):
        builder.add([5] * 10, [False] + [i <= row % 7 for i in range(9)], row)
    run = batches(builder.build(), packing=False, micro_batch_tokens=30)
    assert run.largest_batch().num_targets == 7 + 7 + 6


def test_a_bin_longer_than_the_micro_batch_is_a_batch_of_its_own():
    assert split_micro_batches([5, 100, 10, 10], 20) == [[1], [2, 3], [0]]
    run = batches(random_examples(50), micro_batch_tokens=1)
    assert all(len(batch.input_ids) == 1 for batch in run.step(0))
    assert len(run.largest_batch().input_ids) == 1


def test_tokens_per_step_are_rounded_to_whole_bins():
    examples = random_examples(200)
    for tokens, bins in ((1, 1), (64, 1), (100, 2), (250, 4)):
        assert batches(examples, tokens_per_step=tokens).bins_per_step == bins
    run = batches(examples, tokens_per_step=256)
    assert sum(len(batch.input_ids) for batch in run.step(0)) == 4


def test_without_packing_the_mean_step_is_off_by_at_most_half_a_row():
    """Rounding to whole rows allows no more, over steps that cover whole epochs."""
    examples = random_examples(400)
    mean_length = examples.num_tokens / 400
    run = batches(examples, packing=False, tokens_per_step=512, micro_batch_tokens=128, epochs=3)
    assert run.steps * run.bins_per_step == 3 * 400
    counts = [sum(batch.num_tokens for batch in run.step(i)) for i in range(run.steps)]
    assert sum(counts) == 3 * examples.num_tokens
    assert abs(sum(counts) / len(counts) - 512) <= mean_length / 2


def test_the_last_step_is_filled_from_the_next_epoch_and_epochs_may_be_fractions():
    examples = random_examples(105)
    run = batches(examples, epochs=1)
    assert run.bins_per_epoch % 4
    counts = [sum(len(batch.input_ids) for batch in run.step(i)) for i in range(run.steps)]
    assert counts == [4] * run.steps
    assert run.bins_per_epoch < sum(counts) < run.bins_per_epoch + 4
    seen = Counter(row for i in range(run.steps) for row in rows_of(run.step(i)))
    assert len(seen) == 105
    assert max(seen.values()) == 2
    half = batches(examples, epochs=0.5)
    assert sum(len(b.rows) for i in range(half.steps) for b in half.step(i)) < 65


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("longer", [{"epochs": 2}, {"epochs": 1.5}, {"steps": 40}])
def test_a_longer_run_starts_with_the_same_steps(packing, longer):
    examples = random_examples(105)
    short = batches(examples, packing=packing, epochs=1)
    long = batches(examples, packing=packing, **longer)
    assert short.steps < long.steps
    assert all(same(short.step(i), long.step(i)) for i in range(short.steps))
    assert [short.epoch(i) for i in range(short.steps)] == [
        long.epoch(i) for i in range(short.steps)
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_is_at_most_an_epoch(packing):
    run = batches(random_examples(9), packing=packing, tokens_per_step=100_000, epochs=3)
    assert run.steps == 3
    assert all(rows_of(run.step(i)) == list(range(9)) for i in range(3))


def test_a_number_of_steps_can_be_given_instead_of_epochs():
    run = batches(random_examples(10), tokens_per_step=64, steps=50)
    assert run.steps == 50
    assert run.epoch(49) == 50 * run.bins_per_step / run.bins_per_epoch
    assert len({tuple(rows_of(run.step(i))) for i in range(50)}) > 1


def test_without_shuffling_every_epoch_is_the_same():
    run = batches(random_examples(30), shuffle=False, steps=20)
    assert run._epoch_bins(0) == run._epoch_bins(1)
    first = batches(random_examples(30), shuffle=False, packing=False, tokens_per_step=1)
    assert [rows_of(first.step(i)) for i in range(5)] == [[0], [1], [2], [3], [4]]


def test_evaluation_sees_every_row_once_and_the_longest_first():
    examples = random_examples(60)
    seen = list(evaluation_batches(examples, max_tokens=64, micro_batch_tokens=128))
    assert sorted(row for batch in seen for row in batch.rows) == list(range(60))
    assert seen[0].input_ids.shape[1] == max(batch.input_ids.shape[1] for batch in seen)


def test_without_rows_training_is_refused_and_evaluation_is_empty():
    empty = random_examples(3).select([])
    with pytest.raises(DataError, match="no rows"):
        batches(empty)
    assert list(evaluation_batches(empty, max_tokens=64, micro_batch_tokens=64)) == []


@pytest.mark.parametrize("count", [1, 3, 4])
def test_every_process_has_as_many_batches_and_each_row_is_in_one(count):
    whole = [dataclasses.replace(filler(), rows=[number]) for number in range(count)]
    shares = [share_of(whole, Processes(rank, 2)) for rank in range(2)]
    assert {len(share) for share in shares} == {(count + 1) // 2}
    assert sorted(row for share in shares for batch in share for row in batch.rows) == [
        *range(count)
    ]
