"""What a step sees: each row on its own, the same every time, and all of them once an epoch."""

from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from qlora_lite.data.batches import (
    Batches,
    in_order,
    make_batch,
    make_bin,
    split_micro_batches,
)
from qlora_lite.data.examples import Examples, ExamplesBuilder
from qlora_lite.foundation.errors import DataError
from qlora_lite.kernels.cross_entropy import IGNORE_INDEX
from tests.tiny import VOCABULARY, tiny_model

FP32 = {"rtol": 0, "atol": 1e-5}
"""Sums of the same numbers in another order."""


def random_examples(count: int, longest: int = 40, seed: int = 0) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    builder = ExamplesBuilder()
    for row in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=draw))
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw)
        mask = torch.rand(length, generator=draw) < 0.6
        mask[0], mask[-1] = False, True
        builder.add(ids.tolist(), mask.tolist(), row)
    return builder.build()


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


def test_a_batch_is_its_rows_one_behind_the_other_and_padding():
    builder = ExamplesBuilder()
    builder.add([5, 6, 7], [False, True, True], 0)
    builder.add([8, 9], [False, True], 1)
    builder.add([5, 8, 9], [False, False, True], 2)
    a, b, c = builder.build()
    batch = make_batch([make_bin([a, b]), make_bin([c])])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 8, 9, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, -100, 9, -100], [-100, 9, -100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    assert (batch.num_targets, batch.num_tokens, batch.rows) == (4, 8, [0, 1, 2])


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gpt2", "sdpa"),
        ("gpt2", "eager"),
        ("mistral", "sdpa"),
        ("gemma2", "eager"),
    ],
)
def test_packed_rows_have_the_loss_that_they_have_alone(family, attention):
    model = tiny_model(family, attn_implementation=attention)
    examples = random_examples(12)
    alone = 0.0
    with torch.no_grad():
        for example in examples:
            logits = model(example.ids.long()[None], use_cache=False).logits[0, :-1]
            trained = example.loss_mask[1:]
            alone += F.cross_entropy(
                logits[trained], example.ids[1:].long()[trained], reduction="sum"
            ).item()
    mean_alone = alone / examples.num_targets

    for packing in (True, False):
        total, count, widest = 0.0, 0, 0
        for batch in in_order(examples, max_tokens=64, micro_batch_tokens=130, packing=packing):
            with torch.no_grad():
                logits = model(
                    batch.input_ids,
                    attention_mask=None,
                    position_ids=batch.position_ids,
                    use_cache=False,
                ).logits
            total += F.cross_entropy(
                logits.flatten(0, 1),
                batch.targets.flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            ).item()
            count += batch.num_targets
            widest = max(widest, len(batch.input_ids))
        assert widest > 1
        assert count == examples.num_targets
        torch.testing.assert_close(total / count, mean_alone, **FP32)


def test_a_neighbour_in_the_bin_changes_nothing_to_the_bit():
    model = tiny_model("llama")
    first, second, other = (random_examples(3, seed=s)[0] for s in (1, 2, 3))
    size = min(len(second.ids), len(other.ids))
    logits = []
    for neighbour in (second, other):
        batch = make_batch([make_bin([neighbour, first])])
        batch.input_ids[0, :size] = neighbour.ids[:size]
        with torch.no_grad():
            out = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        logits.append(out[0, -len(first.ids) :])
    torch.testing.assert_close(*logits, **FP32)


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


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_is_the_same_whenever_and_in_whatever_order_it_is_asked_for(packing):
    examples = random_examples(100)
    run = batches(examples, packing=packing, epochs=4)
    forward = [run.step(i) for i in range(run.steps)]
    fresh = batches(examples, packing=packing, epochs=4)
    for i in reversed(range(fresh.steps)):
        assert same(fresh.step(i), forward[i])
    another = batches(examples, packing=packing, epochs=4, seed=1)
    assert not same(another.step(0), forward[0])


@pytest.mark.parametrize("packing", [True, False])
def test_smaller_micro_batches_make_more_of_them_and_the_same_step(packing):
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
def test_no_batch_is_larger_than_allowed_nor_than_the_worst(packing, micro_batch_tokens, num_rows):
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


def test_without_packing_a_step_has_about_as_many_tokens():
    examples = random_examples(400)
    run = batches(examples, packing=False, tokens_per_step=512, micro_batch_tokens=128)
    counts = [sum(batch.num_tokens for batch in run.step(i)) for i in range(run.steps - 1)]
    assert abs(sum(counts) / len(counts) - 512) < 26


def test_the_last_step_is_as_large_as_the_others_and_epochs_may_be_broken():
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
def test_the_steps_of_a_run_are_the_first_ones_of_a_longer_run(packing, longer):
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


def test_a_given_number_of_steps_takes_the_epochs_that_it_needs():
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
    seen = list(in_order(examples, max_tokens=64, micro_batch_tokens=128))
    assert sorted(row for batch in seen for row in batch.rows) == list(range(60))
    assert seen[0].input_ids.shape[1] == max(batch.input_ids.shape[1] for batch in seen)


def test_no_rows_are_no_batches():
    empty = random_examples(3).select([])
    with pytest.raises(DataError, match="no rows"):
        batches(empty)
    assert list(in_order(empty, max_tokens=64, micro_batch_tokens=64)) == []


def test_some_of_the_examples_are_the_same_examples():
    examples = random_examples(10)
    some = examples.select([7, 2])
    for ours, theirs in zip(some, (examples[7], examples[2]), strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.loss_mask, theirs.loss_mask)
        assert ours.row == theirs.row
