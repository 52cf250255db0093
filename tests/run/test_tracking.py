"""Experiment trackers."""

import pytest
import torch
from torch import distributed

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.processes import Processes
from qlora_lite.run.tracking import require_trackers, tracking
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


def test_trackers_leave_the_communication_of_the_processes_alone(folder, monkeypatch):
    pytest.importorskip("tensorboard")
    recipe = recipe_in(folder, "one-of-several", 'tracking=["tensorboard"]')
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    threads = torch.get_num_threads()
    try:
        with tracking(recipe, folder, Processes(world=2)) as track:
            track({"loss": 1.0}, 1)
        assert distributed.is_initialized()
        assert torch.get_num_threads() == threads
    finally:
        distributed.destroy_process_group()
