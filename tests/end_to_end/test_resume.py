"""A run that was killed at any moment ends with the same bits as one that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import defaultdict

import pytest
import torch
from torch.nn import functional as F

from qlora_lite.foundation.errors import RunError
from qlora_lite.run.planning import plan_recipe
from qlora_lite.run.training import run_recipe
from qlora_lite.training import loop
from qlora_lite.training.engine import TorchEngine
from tests.end_to_end.small_run import (
    finish_in_child,
    recipe_in,
    result_of,
    run_in_child,
    small_recipe,
    write_rows,
)


@pytest.fixture(scope="module")
def uninterrupted(folder):
    finish_in_child(recipe_in(folder, "uninterrupted"))
    return result_of(folder / "uninterrupted")


def moments():
    """During a step, a checkpoint and the final save; those before the first step are slow."""
    for moment in ("step", "checkpoint", "final save"):
        yield moment
    for moment in ("recipe.json", "first scoring", "first steps"):
        yield pytest.param(moment, marks=pytest.mark.slow)


@pytest.mark.parametrize("moment", list(moments()))
def test_a_killed_and_continued_run_ends_with_the_same_bits(folder, uninterrupted, moment):
    name = moment.replace(" ", "_")
    recipe = recipe_in(folder, name)
    child = run_in_child(recipe, moment)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    finish_in_child(recipe)
    result = result_of(folder / name)
    assert result["metrics"] == uninterrupted["metrics"]
    assert result == uninterrupted


@pytest.fixture
def masks(monkeypatch):
    """The dropout masks of every step by its number, while a run trains in this process."""
    drawn, dropout, prepare_step = defaultdict(list), F.dropout, loop.prepare_step
    step = -1  # the dry run before the first step

    def recording(x, p, training):
        mask = dropout(torch.ones_like(x), p, training)
        if training:
            drawn[step].append(mask.detach().clone())
        return x * mask

    def numbered(method, optim, seed, number, total):
        nonlocal step
        step = number
        return prepare_step(method, optim, seed, number, total)

    monkeypatch.setattr(F, "dropout", recording)
    monkeypatch.setattr(loop, "prepare_step", numbered)
    return drawn


def test_a_resumed_run_draws_the_dropout_masks_of_one_that_ran_through(folder, masks, monkeypatch):
    short = ("optim.steps=4", "checkpoints.every=2")
    run_recipe(recipe_in(folder, "ran-through", *short))
    expected = dict(masks)
    masks.clear()

    step = TorchEngine.step

    def interrupted(engine, max_norm, info):
        if info.step == 3:
            raise KeyboardInterrupt
        return step(engine, max_norm, info)

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe_in(folder, "resumed", *short))
    masks.clear()
    run_recipe(recipe_in(folder, "resumed", *short))
    assert sorted(masks) == [2, 3]
    for number, found in masks.items():
        assert len(found) == len(expected[number])
        assert all(map(torch.equal, found, expected[number]))
        other = expected[number - 1][0]  # batches differ in length
        assert not torch.equal(found[0].flatten()[:512], other.flatten()[:512])


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(folder):
    every = ("checkpoints.every=1", "optim.steps=30", "evaluation.every=5")
    start = time.perf_counter()
    finish_in_child(recipe_in(folder, "uninterrupted-30", *every))
    duration = time.perf_counter() - start
    expected = result_of(folder / "uninterrupted-30")
    draw = random.Random(0)
    kills = 0
    while kills < 20:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        recipe = recipe_in(folder, "killed", *every)
        exitcode = None
        while exitcode != 0:
            child = run_in_child(recipe)
            child.join(draw.uniform(0.05, 1.0) * duration)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += child.exitcode == -signal.SIGKILL
            exitcode = child.exitcode
        assert result_of(folder / "killed") == expected


def test_after_sigterm_the_run_is_saved_exits_with_130_and_continues(folder, uninterrupted):
    recipe = recipe_in(folder, "terminated")
    child = run_in_child(recipe)
    metrics = folder / "terminated" / "metrics.jsonl"
    while not metrics.exists() or '"step": 2,' not in metrics.read_text():
        time.sleep(0.01)
        assert child.is_alive()
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 130
    assert list((folder / "terminated" / "checkpoints").glob("step-*"))
    assert not (folder / "terminated" / "adapter").exists()
    finish_in_child(recipe)
    assert result_of(folder / "terminated")["metrics"] == uninterrupted["metrics"]
    assert result_of(folder / "terminated") == uninterrupted


def test_a_finished_run_is_reported_and_not_changed(folder, uninterrupted):
    result = run_recipe(recipe_in(folder, "uninterrupted"))
    assert result.already_finished
    assert result_of(folder / "uninterrupted") == uninterrupted


def test_another_recipe_on_the_same_folder_is_refused_with_the_difference(folder, uninterrupted):
    with pytest.raises(RunError, match=r"optim\.lr: 0\.005 -> 0\.001"):
        run_recipe(recipe_in(folder, "uninterrupted", "optim.lr=1e-3"))
    with pytest.raises(RunError, match="add --extend"):
        run_recipe(recipe_in(folder, "uninterrupted", "optim.steps=20"))
    with pytest.raises(RunError, match="only changes how long"):
        run_recipe(recipe_in(folder, "uninterrupted", "optim.lr=1e-3"), extend=True)
    with pytest.raises(RunError, match="without a new length"):
        run_recipe(recipe_in(folder, "uninterrupted"), extend=True)


def test_an_extended_run_continues_from_its_last_step(folder, uninterrupted):
    shutil.copytree(folder / "uninterrupted", folder / "longer")
    finish_in_child(recipe_in(folder, "longer", "optim.steps=16"), extend=True)
    events = result_of(folder / "longer")["metrics"]
    assert events[: len(uninterrupted["metrics"])] == uninterrupted["metrics"]
    assert [e["step"] for e in events if "loss" in e] == list(range(1, 17))
    sidecar = json.loads((folder / "longer" / "adapter" / "qlora_lite.json").read_text())
    assert sidecar["steps"] == 16


def test_a_killed_extension_ends_with_the_same_bits(folder):
    changes = ("optim.lr=0.3", "optim.schedule=constant", "evaluation.every=1")
    patient = (*changes, "evaluation.patience=2", "checkpoints.every=1")
    finish_in_child(recipe_in(folder, "uninterrupted-extension", *patient, "optim.steps=3"))
    shutil.copytree(folder / "uninterrupted-extension", folder / "killed-extension")
    longer = (*patient, "optim.steps=9")
    finish_in_child(recipe_in(folder, "uninterrupted-extension", *longer), extend=True)
    child = run_in_child(recipe_in(folder, "killed-extension", *longer), "first steps", extend=True)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    finish_in_child(recipe_in(folder, "killed-extension", *longer), extend=True)
    assert result_of(folder / "killed-extension") == result_of(folder / "uninterrupted-extension")


def test_a_run_cannot_become_shorter(folder, uninterrupted):
    with pytest.raises(RunError, match=r"already done 12 steps, and the recipe has 5"):
        run_recipe(recipe_in(folder, "uninterrupted", "optim.steps=5"), extend=True)
    assert result_of(folder / "uninterrupted") == uninterrupted


def test_a_resumed_run_keeps_its_micro_batches_under_another_budget(folder):
    free = ("optim.micro_batch_tokens=null", "optim.tokens_per_step=512")
    smallest = plan_recipe(recipe_in(folder, "tight", *free, "budget=1B"))
    tight = (*free, f"budget={smallest.peak_bytes}B")
    roomy = (*free, "budget=4GiB")
    chosen = plan_recipe(recipe_in(folder, "tight", *tight)).micro_batch_tokens
    assert chosen < plan_recipe(recipe_in(folder, "tight", *roomy)).micro_batch_tokens
    finish_in_child(recipe_in(folder, "tight", *tight))
    child = run_in_child(recipe_in(folder, "tight-then-roomy", *tight), "step")
    child.join()
    assert child.exitcode == -signal.SIGKILL
    finish_in_child(recipe_in(folder, "tight-then-roomy", *roomy))
    assert result_of(folder / "tight-then-roomy") == result_of(folder / "tight")


def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(folder, uninterrupted):
    child = run_in_child(recipe_in(folder, "damaged", "checkpoints.every=2"), "step")
    child.join()
    checkpoints = sorted((folder / "damaged" / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    os.truncate(checkpoints[-1] / "adapter.safetensors", 50)
    finish_in_child(recipe_in(folder, "damaged", "checkpoints.every=2"))
    result = result_of(folder / "damaged")
    assert result["metrics"] == uninterrupted["metrics"]
    assert result["adapter/native.safetensors"] == uninterrupted["adapter/native.safetensors"]


def test_a_setting_that_is_missing_in_an_old_record_counts_as_its_default(folder, uninterrupted):
    record = folder / "uninterrupted" / "recipe.json"
    values = json.loads(record.read_text())
    old = json.loads(record.read_text())
    del old["recipe"]["optim"]["lr_floor"]
    record.write_text(json.dumps(old))
    assert run_recipe(recipe_in(folder, "uninterrupted")).already_finished
    record.write_text(json.dumps(values))


def test_changed_data_under_an_unfinished_run_is_refused(folder):
    data = write_rows(folder / "changing.jsonl")
    recipe = small_recipe(folder / "base", data, folder / "changed")
    child = run_in_child(recipe, "step")
    child.join()
    write_rows(folder / "changing.jsonl", 121)
    with pytest.raises(RunError, match=r"the data of .* changed since the run started"):
        run_recipe(recipe)


def test_two_processes_cannot_share_a_folder(folder):
    recipe = recipe_in(folder, "shared", "optim.steps=200")
    child = run_in_child(recipe)
    while not (folder / "shared" / "metrics.jsonl").exists():
        time.sleep(0.01)
        assert child.is_alive()
    try:
        with pytest.raises(RunError, match=f"in use by process {child.pid}"):
            run_recipe(recipe)
    finally:
        child.kill()
        child.join()


def test_a_folder_that_is_not_a_run_is_not_touched(folder):
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"not empty \(it contains thesis.tex\)"):
        run_recipe(recipe_in(folder, "precious"))
    assert os.listdir(folder / "precious") == ["thesis.tex"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_after_a_full_disk_the_older_checkpoint_is_usable(folder, small_disk):
    recipe = small_recipe(
        folder / "base", folder / "train.jsonl", small_disk / "run", "adapter.rank=16"
    )
    recipe = recipe.but("checkpoints.keep=100", "checkpoints.every=1")
    with pytest.raises(RunError, match=r"the disk is full.*is intact and the same command"):
        run_recipe(recipe)
    checkpoints = small_disk / "run" / "checkpoints"
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left
    assert all(name.startswith("step-") for name in left)
    for name in left[:-1]:
        shutil.rmtree(checkpoints / name)
    with pytest.raises(RunError, match="the disk is full"):
        run_recipe(recipe)  # it went on, some steps further
    assert sorted(path.name for path in checkpoints.iterdir())[-1] > left[-1]
