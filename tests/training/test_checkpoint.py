"""Checkpoints are complete or absent."""

import os
import signal
from dataclasses import asdict

import pytest
import torch

from qlora_lite.foundation.errors import RunError
from qlora_lite.training import checkpoint
from qlora_lite.training.checkpoint import TrainingState
from qlora_lite.training.loop import Progress
from tests.damage import die_at_disk_call, flip_bit, fork


def state(value=1.0, step=3):
    return TrainingState(
        adapter={"layer.a": torch.full((2, 3), value, dtype=torch.bfloat16)},
        engine={"layer.a:exp_avg": torch.full((2, 3), value / 3), "layer.a:count": 7},
        method={"mask": torch.tensor([True, False]), "phase": "warm"},
        progress=asdict(Progress(step=step)),
    )


def test_loading_restores_every_bit(tmp_path):
    saved = state()
    loaded = checkpoint.load(checkpoint.save(tmp_path, 3, saved, keep=2))
    for part in ("adapter", "engine", "method"):
        before, after = getattr(saved, part), getattr(loaded, part)
        assert before.keys() == after.keys()
        for name, value in before.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(after[name], value)
                assert after[name].dtype == value.dtype
            else:
                assert after[name] == value
    assert loaded.progress == saved.progress


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 999_999, 1_000_000):
        checkpoint.save(tmp_path, step, state(), keep=2)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    assert checkpoint.newest(tmp_path).name == "step-1000000"


def test_half_written_checkpoints_are_ignored(tmp_path):
    checkpoint.save(tmp_path, 5, state(), keep=2)
    (tmp_path / ".step-000010.writing").mkdir()
    assert checkpoint.newest(tmp_path).name == "step-000005"


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 5, state(), keep=2)
    os.truncate(path / "adapter.safetensors", 40)
    with pytest.raises(RunError, match=r"step-000005 is damaged.*delete that folder"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_in_any_file_is_damage(tmp_path, name):
    path = checkpoint.save(tmp_path, 5, state(step=5), keep=2)
    older = checkpoint.save(tmp_path, 4, state(step=4), keep=2)
    size = (path / name).stat().st_size
    for position in (size // 2, size - 8):
        flip_bit(path / name, position)
        with pytest.raises(RunError, match="step-000005 is damaged"):
            checkpoint.load(path)
        assert checkpoint.find_newest(tmp_path, lambda note: None) == older
        flip_bit(path / name, position)
    checkpoint.load(path)


def test_the_best_adapter_is_checked_too(tmp_path):
    checkpoint.save_best(tmp_path, state(1.0).adapter, {"seed": 0})
    checkpoint.save_best(tmp_path, state(2.0).adapter, {"seed": 0})
    assert checkpoint.load_best(tmp_path, {"seed": 0})["layer.a"].eq(2).all()
    with pytest.raises(RunError, match=r"best is of another run:\n  seed: 0 -> 1\n"):
        checkpoint.load_best(tmp_path, {"seed": 1})
    flip_bit(tmp_path / "best" / "adapter.safetensors", -1)
    with pytest.raises(RunError, match="best is damaged"):
        checkpoint.load_best(tmp_path, {"seed": 0})


def test_a_setting_that_a_checkpoint_did_not_record_is_not_compared(tmp_path):
    path = checkpoint.save(tmp_path, 5, state(), keep=2)
    checkpoint.require_origin(path, {"optim.of_tomorrow": 1})


def _save_and_die(directory, call):
    die_at_disk_call(call)
    for step in (5, 10, 15):
        checkpoint.save(directory, step, state(step=step), keep=1)


@pytest.mark.parametrize("call", [20, 21, 22, 23, 24, 25, 26, 27, 28])
def test_a_kill_while_old_checkpoints_are_deleted_leaves_whole_ones(tmp_path, call):
    child = fork.Process(target=_save_and_die, args=(tmp_path, call))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    for path in checkpoint.all_checkpoints(tmp_path):
        checkpoint.load(path)
    assert checkpoint.all_checkpoints(tmp_path)
    checkpoint.clean(tmp_path)
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())


def test_a_checkpoint_that_was_being_replaced_is_restored(tmp_path):
    checkpoint.save(tmp_path, 5, state(), keep=1).rename(tmp_path / ".step-000005.old")
    (tmp_path / ".step-000010.writing").mkdir()
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_folders_with_other_names_are_ignored(tmp_path):
    (tmp_path / "step-foo").mkdir()
    assert checkpoint.newest(tmp_path) is None
