"""The training loop: early stopping, what a resume loads, and when events are due."""

import json
from itertools import chain, count, pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite.run import job
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics
from qlora_lite.training.loop import Progress, _compare_with_best, _is_due
from tests.end_to_end.small_run import recipe_in


def events_of(folder, name):
    return metrics.read(folder / name / "metrics.jsonl")


def heldout_losses(folder, name):
    """Held-out loss by step."""
    events = events_of(folder, name)
    return {e["step"]: e["heldout_loss"] for e in events if "heldout_loss" in e}


@pytest.mark.parametrize(
    ("every", "total", "expected"),
    [
        (4, 10, [4, 8, 10]),
        (None, 25, [3, 6, 9, 12, 15, 18, 21, 24, 25]),
        (None, 5, [1, 2, 3, 4, 5]),
        (100, 3, [3]),
    ],
)
def test_events_are_due_at_multiples_and_at_the_last_step(every, total, expected):
    assert [step for step in range(1, total + 1) if _is_due(step, every, total)] == expected


@pytest.fixture
def best_after_two_steps(monkeypatch):
    """Held-out losses fall until step 2 and rise from then on, on every processor."""
    losses = chain([6.0, 5.0, 4.0], (4.5 + 0.1 * i for i in count()))

    def score(model, batches, sum_over_processes):
        return SimpleNamespace(loss=next(losses), accuracy=0.5, perplexity=1.0)

    monkeypatch.setattr(job, "score", score)


@pytest.mark.usefixtures("best_after_two_steps")
def test_early_stopping_saves_the_best_adapter_and_records_it(folder):
    changes = ("optim.lr=0.05", "optim.schedule=constant", "evaluation.every=1")
    result = run_recipe(recipe_in(folder, "early", *changes, "evaluation.patience=2"))
    losses = heldout_losses(folder, "early")
    best = min(losses, key=lambda step: losses[step])
    assert (best, max(losses)) == (2, 4)
    assert result.steps == best
    assert result.scores["loss"] == losses[best]
    sidecar = json.loads((folder / "early" / "adapter" / "qlora_lite.json").read_text())
    assert (sidecar["state"], sidecar["steps"]) == ("best", best)
    saved = load_file(folder / "early" / "adapter" / "native.safetensors")
    of_best = load_file(folder / "early" / "checkpoints" / "best" / "adapter.safetensors")
    last = sorted((folder / "early" / "checkpoints").glob("step-*"))[-1]
    of_last = load_file(last / "adapter.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in of_best.items())
    assert any(not torch.equal(saved[name], tensor) for name, tensor in of_last.items())


def test_with_patience_the_best_adapter_is_saved_even_if_the_run_did_not_stop_early(folder):
    changes = ("optim.lr=0.05", "optim.schedule=constant", "evaluation.every=1")
    result = run_recipe(recipe_in(folder, "patient", *changes, "evaluation.patience=50"))
    losses = heldout_losses(folder, "patient")
    assert max(losses) == 12
    assert result.scores["loss"] == min(losses.values())


def test_early_stopping_waits_for_adaloras_final_budget(folder):
    changes = ("optim.lr=0.5", "optim.schedule=constant", "evaluation.every=1")
    method = ("adapter=adalora", "adapter.target_rank=2", "adapter.warmup=2", "adapter.final=4")
    result = run_recipe(recipe_in(folder, "budget", *changes, *method, "evaluation.patience=1"))
    losses = heldout_losses(folder, "budget")
    earlier = [losses[step] for step in range(8)]
    assert any(after > before for before, after in pairwise(earlier))
    assert result.steps >= 8
    native = load_file(folder / "budget" / "adapter" / "native.safetensors")
    masks = [tensor != 0 for name, tensor in native.items() if name.endswith(".e")]
    assert sum(int(mask.sum()) for mask in masks) == 2 * len(masks)


def test_a_held_out_loss_that_only_equals_the_best_counts_against_patience():
    patient = SimpleNamespace(keeps_best=False, evaluation=SimpleNamespace(patience=2))
    progress, stopped = Progress(), []
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.0], start=1):
        progress.step = step
        _compare_with_best(patient, progress, loss)
        stopped.append(progress.stopped_early)
    assert stopped == [False, False, False, True]
    assert (progress.best_loss, progress.best_step) == (2.0, 2)


@pytest.mark.usefixtures("best_after_two_steps")
def test_a_run_that_stopped_early_continues_when_it_is_extended(folder):
    changes = ("optim.lr=0.05", "optim.schedule=constant", "evaluation.every=1")
    patient = (*changes, "evaluation.patience=2")
    run_recipe(recipe_in(folder, "stopped", *patient))
    stopped = max(heldout_losses(folder, "stopped"))
    assert stopped < 12
    run_recipe(recipe_in(folder, "stopped", *patient, "optim.steps=16"), extend=True)
    # nothing is better than before, so it stops again after two more scorings
    assert max(heldout_losses(folder, "stopped")) == stopped + 2
