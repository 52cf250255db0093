"""Checkpoints are complete or absent."""

import os
from dataclasses import asdict

import pytest
import torch

from qlora_lite.foundation.errors import RunError
from qlora_lite.training import checkpoint
from qlora_lite.training.checkpoint import TrainingState
from qlora_lite.training.loop import Progress


def state(value=1.0):
    return TrainingState(
        adapter={"layer.a": torch.full((2, 3), value, dtype=torch.bfloat16)},
        engine={"layer.a:exp_avg": torch.full((2, 3), value / 3), "layer.a:count": 7},
        method={"mask": torch.tensor([True, False]), "phase": "warm"},
        progress=asdict(Progress(step=3)),
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
