"""The metrics log: what it keeps after a kill, and that a checkpoint never outlives it."""

import re

from qlora_lite.run.training import run_recipe
from qlora_lite.training.metrics import MetricsLog, read
from tests.disk_calls import record_disk_calls
from tests.end_to_end.small_run import recipe_in


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert read(log.path) == []
    log.append({"step": 1, "loss": 2.5})
    with open(log.path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert read(log.path) == [{"step": 1, "loss": 2.5}]


def test_rewinding_keeps_the_events_up_to_a_step(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(1)
    assert not log.path.exists()
    for step in (1, 2, 2, 3):
        log.append({"step": step})
    with open(log.path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    log.rewind(2)
    log.append({"step": 3, "loss": 0.5})
    assert read(log.path) == [{"step": 1}, {"step": 2}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_sync_writes_the_log_to_the_disk(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    calls = record_disk_calls(monkeypatch, tmp_path)
    log.sync()
    log.append({"step": 1})
    log.sync()
    assert calls == ["sync metrics.jsonl (12 bytes)"]


def test_the_log_is_synced_before_a_checkpoint_is_renamed(folder, monkeypatch):
    """Otherwise a resume continues after step N with a log that ends before it."""
    recipe = recipe_in(
        folder, "run", "optim.steps=2", "checkpoints.every=1", "evaluation.samples=0"
    )
    calls = record_disk_calls(monkeypatch, folder / "run")
    run_recipe(recipe)
    pattern = (
        r"sync metrics\.jsonl \((\d+) bytes\)|rename checkpoints/\S+ -> checkpoints/(step-\d+)"
    )
    found = [match.groups() for call in calls if (match := re.fullmatch(pattern, call))]
    lines = (folder / "run" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    sizes = [str(sum(map(len, lines[:count]))) for count in (2, len(lines))]
    assert found == [
        (sizes[0], None),
        (None, "step-000001"),
        (sizes[1], None),
        (None, "step-000002"),
    ]
