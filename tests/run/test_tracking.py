"""Experiment trackers."""

import pytest

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.run.tracking import require_trackers
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import recipe_in


def test_tensorboard_gets_the_loss_of_every_step(folder):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    run_recipe(recipe_in(folder, "tracked", 'tracking=["tensorboard"]', "optim.steps=3"))
    (file,) = (folder / "tracked").rglob("events.out.tfevents*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_a_tracker_that_is_not_installed_is_an_error_before_the_run_starts(folder):
    with pytest.raises(RecipeError, match="pip install wandb"):
        run_recipe(recipe_in(folder, "untracked", 'tracking=["wandb"]'))
    assert not (folder / "untracked").exists()
    require_trackers(["tensorboard"])
