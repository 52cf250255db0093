"""The number of steps follows from the time that a step takes."""

import pytest

from qlora_lite.demo.pace import FEWEST_STEPS, MOST_STEPS, TRAINING_SECONDS, affordable_steps


@pytest.mark.parametrize("compute", TRAINING_SECONDS)
def test_the_steps_fill_the_time(compute):
    seconds = TRAINING_SECONDS[compute] / 30
    assert affordable_steps(seconds * 0.999, compute) == 30
    assert affordable_steps(seconds * 1.001, compute) == 29


def test_a_slow_machine_trains_the_fewest_steps_and_a_fast_one_the_most():
    assert affordable_steps(1000.0, "bf16") == FEWEST_STEPS
    assert affordable_steps(0.001, "bf16") == MOST_STEPS
