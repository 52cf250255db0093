"""Checks that stop a run at once, with the step, the learning rate and the rows."""

import math

import pytest

from qlora_lite.foundation.errors import TrainingError
from qlora_lite.training.health import check_gradient, check_heldout_loss, check_loss

VOCABULARY = 1000


def show(batch):
    return f"rows of {batch}"


def check(loss, step):
    check_loss(loss, "the batch", step, VOCABULARY, 2e-4, show)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_names_the_rate_only_after_a_step(loss):
    with pytest.raises(TrainingError) as error:
        check(loss, 0)
    assert str(error.value).startswith(f"the first loss is {loss}")
    assert "damaged" in str(error.value)
    assert "optim.lr" not in str(error.value)
    assert str(error.value).endswith("\nrows of the batch")
    with pytest.raises(TrainingError) as error:
        check(loss, 41)
    assert str(error.value).startswith(f"step 42: the loss is {loss}")
    assert "optim.lr (now 0.0002)" in str(error.value)
    assert str(error.value).endswith("\nrows of the batch")


def test_a_first_loss_of_1_3_times_guessing_is_the_limit():
    limit = 8.9801  # 1.3 ln(1000)
    check(limit - 0.001, step=0)
    with pytest.raises(TrainingError, match=r"8\.98, above 8\.98 = 1\.3 ln\(1000\)(.|\n)*rows of"):
        check(limit + 0.001, step=0)
    check(100.0, step=1)


def test_a_held_out_loss_that_is_not_finite_names_the_rate_only_after_training():
    check_heldout_loss(3.0, 0, 2e-4, lambda: "")
    with pytest.raises(TrainingError, match=r"after step 7 .*optim\.lr \(now 0\.0002\)"):
        check_heldout_loss(math.nan, 7, 2e-4, lambda: "")
    with pytest.raises(
        TrainingError, match=r"before the first step .*damaged(.|\n)*row 1"
    ) as error:
        check_heldout_loss(math.nan, 0, 2e-4, lambda: "row 1")
    assert "optim.lr" not in str(error.value)


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf])
def test_a_gradient_that_is_zero_or_not_finite_stops(norm):
    check_gradient(1e-12, 3.0, "the batch", 3, VOCABULARY, 2e-4, show)
    with pytest.raises(TrainingError, match=rf"step 1: .* {norm}.*damaged(.|\n)*rows of"):
        check_gradient(norm, 3.0, "the batch", 0, VOCABULARY, 2e-4, show)


@pytest.mark.parametrize(("norm", "loss"), [(0.0, 50.0), (math.nan, 3.0), (math.inf, 50.0)])
def test_training_that_diverged_names_the_learning_rate_and_not_the_targets(norm, loss):
    with pytest.raises(TrainingError, match=r"step 4: training diverged.*now 1000\)") as error:
        check_gradient(norm, loss, "the batch", 3, VOCABULARY, 1000, show)
    assert "adapter.targets" not in str(error.value)
