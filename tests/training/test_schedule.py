"""Learning rates are pure functions of the step."""

import math

import pytest

from qlora_lite.training.schedule import lr_factor, warmup_steps


def curve(schedule, total=100, warmup=10, floor=0.0):
    return [lr_factor(step, total, warmup, schedule, floor) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_warm_up_is_linear_and_does_not_start_at_zero(schedule):
    rates = curve(schedule)
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0


def test_cosine_and_linear_fall_towards_the_floor_and_no_step_has_rate_zero():
    for schedule in ("cosine", "linear"):
        rates = curve(schedule, floor=0.1)[10:]
        assert rates == sorted(rates, reverse=True)
        assert 0 < curve(schedule)[-1] < 0.02
        assert 0.1 < rates[-1] < 0.12
    assert curve("constant")[-1] == 1.0


def test_half_way_cosine_and_linear_are_at_one_half():
    assert lr_factor(50, 100, 0, "cosine", 0.0) == pytest.approx(0.5)
    assert lr_factor(50, 100, 0, "linear", 0.0) == pytest.approx(0.5)
    assert lr_factor(25, 100, 0, "cosine", 0.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_warm_up_is_a_share_or_a_number_of_steps():
    assert warmup_steps(0.03, 1000) == 30
    assert warmup_steps(50, 1000) == 50
    assert warmup_steps(50, 20) == 20
    assert warmup_steps(0, 20) == 0


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_rate_of_very_short_runs_is_not_zero(total):
    for schedule in ("cosine", "linear", "constant"):
        assert lr_factor(0, total, warmup_steps(0.03, total), schedule, 0.0) > 0
