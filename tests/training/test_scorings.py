"""Scoring takes at most a tenth of a run, unless the recipe asks for more."""

import pytest

from qlora_lite.training.scorings import MAX_SHARE, MOST, choose_scorings
from qlora_lite.training.settings import Evaluation


def chosen(lengths, evaluation=None, *, steps=40, num_rows=None, checkpointing=True):
    return choose_scorings(
        evaluation or Evaluation(),
        lengths,
        steps=steps,
        tokens_per_step=1000,
        checkpointing=checkpointing,
        num_rows=num_rows,
    )


def times(scorings, steps):
    due = [step for step in range(1, steps) if step % scorings.every == 0]
    return 2 + len(due)  # the start, and the last step


def share(scorings, lengths, steps, checkpointing):
    scored = times(scorings, steps) * sum(lengths[i] for i in scorings.rows)
    return scored / (scored + steps * 1000 * (3 if checkpointing else 2))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("steps", [1, 7, 40, 1000])
@pytest.mark.parametrize("num_rows", [1, 20, 500, 5000])
def test_scoring_takes_at_most_a_tenth(num_rows, steps, checkpointing):
    lengths = [100] * num_rows
    found = chosen(lengths, steps=steps, checkpointing=checkpointing)
    one_row = share(found, lengths, steps, checkpointing) if len(found.rows) == 1 else 0
    assert share(found, lengths, steps, checkpointing) <= max(MAX_SHARE, one_row)
    assert times(found, steps) <= MOST


def test_few_rows_are_scored_after_every_tenth():
    found = chosen([10] * 5, steps=200)
    assert found.every == 20
    assert list(found.rows) == [0, 1, 2, 3, 4]


def test_more_rows_are_first_scored_less_often_then_fewer_of_them():
    often = chosen([100] * 30)
    rarely = chosen([100] * 66)
    fewer = chosen([100] * 70)
    assert often.every < rarely.every <= fewer.every
    assert (len(often.rows), len(rarely.rows)) == (30, 66)
    assert times(fewer, 40) == 2
    assert len(fewer.rows) < 70


def test_rows_are_spread_over_all_held_out_rows():
    rows = list(chosen([100] * 1000).rows)
    assert rows == sorted(set(rows))
    assert rows[0] <= 50
    assert rows[-1] >= 950


def test_uneven_rows_are_counted_by_their_tokens():
    lengths = [2000] + [10] * 470
    found = chosen(lengths, steps=10)
    assert share(found, lengths, 10, checkpointing=True) <= MAX_SHARE


def test_fewer_rows_are_scored_as_often_as_they_allow():
    found = chosen([100] * 1000, Evaluation(rows=50), steps=100)
    assert len(found.rows) == 50
    assert times(found, 100) > 5


def test_what_is_asked_for_is_done():
    lengths = [100] * 5000
    assert chosen(lengths, Evaluation(every=1)).every == 1
    assert len(chosen(lengths, Evaluation(every=1)).rows) == 5000
    assert len(chosen(lengths, Evaluation(rows=3000)).rows) == 3000
    assert len(chosen(lengths[:10], Evaluation(rows=3000)).rows) == 10
    assert len(chosen(lengths, Evaluation(every=1, rows=7)).rows) == 7


def test_a_resumed_run_scores_the_same_rows():
    lengths = [100] * 5000
    first = chosen(lengths, steps=40)
    extended = chosen(lengths, steps=400, num_rows=len(first.rows))
    assert list(extended.rows) == list(first.rows)


def test_without_held_out_rows_nothing_is_scored():
    assert list(chosen([]).rows) == []
