"""Bins and batches: each row attends to itself only, and has the loss that it has alone."""

import pytest
import torch
from torch.nn import functional as F

from qlora_lite.data.batches import evaluation_batches
from qlora_lite.data.collate import make_batch, make_bin
from qlora_lite.data.examples import ExamplesBuilder
from qlora_lite.kernels.cross_entropy import IGNORE_INDEX
from tests.data.random_rows import random_examples
from tests.tiny import VOCABULARY, tiny_model

FP32 = {"rtol": 0, "atol": 1e-5}
"""The same numbers, summed in another order."""


def test_a_batch_is_concatenated_rows_and_padding():
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
def test_packed_rows_have_the_same_loss_as_single_rows(family, attention):
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
        for batch in evaluation_batches(
            examples, max_tokens=64, micro_batch_tokens=130, packing=packing
        ):
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


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gemma2", "eager")])
def test_a_neighbour_in_the_bin_does_not_change_the_logits_by_a_bit(family, attention):
    model = tiny_model(family, attn_implementation=attention)
    neighbour, row = random_examples(2, seed=1)
    batch = make_batch([make_bin([neighbour, row])])
    other_ids = torch.randint(3, VOCABULARY, (len(neighbour.ids),))
    assert not torch.equal(batch.input_ids[0, : len(other_ids)], other_ids)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            out = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return out[0, -len(row.ids) :]

    before = logits()
    batch.input_ids[0, : len(other_ids)] = other_ids
    assert torch.equal(logits(), before)
