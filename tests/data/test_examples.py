"""Many tokenised rows in flat tensors."""

import torch

from qlora_lite.data.examples import ExamplesBuilder
from tests.data.random_rows import random_examples


def test_examples_are_what_was_added():
    builder = ExamplesBuilder()
    builder.add([5, 6, 7], [False, True, True], 4)
    builder.add([8, 9], [False, False], 2)
    examples = builder.build()
    assert [(e.ids.tolist(), e.loss_mask.tolist(), e.row) for e in examples] == [
        ([5, 6, 7], [False, True, True], 4),
        ([8, 9], [False, False], 2),
    ]
    assert examples.lengths == [3, 2]
    assert (len(examples), examples.num_tokens, examples.num_targets) == (2, 5, 2)


def test_no_examples_are_empty_tensors():
    empty = ExamplesBuilder().build()
    assert (len(empty), empty.num_tokens, empty.num_targets, empty.lengths) == (0, 0, 0, [])
    assert len(random_examples(3).select([])) == 0


def test_selected_examples_are_equal_and_in_the_given_order():
    examples = random_examples(10)
    some = examples.select([7, 2, 3, 4, 9])
    for ours, theirs in zip(some, [examples[i] for i in (7, 2, 3, 4, 9)], strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.loss_mask, theirs.loss_mask)
        assert ours.row == theirs.row
