"""The metrics log: what it keeps after a kill, and that a checkpoint never outlives it."""

import json
import re

import pytest

from qlora_lite.run.training import run_recipe
from qlora_lite.training.metrics import MetricsLog, problems, read
from tests.disk_calls import record_disk_calls
from tests.end_to_end.small_run import recipe_in

STEPS = [{"step": n, "loss": 2.5, "tokens": 64 * n, "seconds": 0.5 * n} for n in (1, 2, 3)]
SCORING = {"step": 2, "heldout_loss": 2.25, "seconds": 1.0}


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert read(log.path) == []
    log.append(STEPS[0])
    with open(log.path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert read(log.path) == [STEPS[0]]
    assert problems(log.path, 1) == []


def test_rewinding_keeps_the_events_up_to_a_step(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(1)
    assert not log.path.exists()
    for event in (*STEPS[:2], SCORING, STEPS[2]):
        log.append(event)
    with open(log.path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    log.rewind(2)
    log.append(STEPS[2] | {"loss": 0.5})
    assert read(log.path) == [*STEPS[:2], SCORING, STEPS[2] | {"loss": 0.5}]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda lines: [], "step 1 of 3 missing ones"),
        (lambda lines: [lines[0], lines[2]], "step 2 of 3 missing ones"),
        (lambda lines: [lines[0], "not JSON", *lines[1:]], "line 2 of 1 damaged ones"),
        (lambda lines: ["[]", *lines], "line 1 of 1 damaged ones"),
    ],
)
def test_an_incomplete_history_is_reported(tmp_path, damage, found):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(event) for event in STEPS]
    path.write_text("\n".join(damage(lines)) + "\n")
    if found.startswith("step 2"):
        found = "step 2 of 1 missing ones"
    (problem,) = problems(path, 3)
    assert f"({found})" in problem
    path.write_text("\n".join(lines) + "\n")
    assert problems(path, 3) == []


BROKEN = {
    "seconds": ["x", None, -1, "missing"],
    "tokens": ["x", None, 0.5, "missing"],
    "loss": ["x", None, float("inf"), float("nan")],
    "step": ["x", None, -1, "missing"],
}


@pytest.mark.parametrize("field", BROKEN)
def test_a_line_with_a_damaged_field_is_left_out_and_reported(tmp_path, field):
    path = tmp_path / "metrics.jsonl"
    for value in BROKEN[field]:
        broken = STEPS[1] | {field: value}
        if value == "missing":
            del broken[field]
        path.write_text("".join(json.dumps(e) + "\n" for e in (STEPS[0], broken, STEPS[2])))
        assert read(path) == [STEPS[0], STEPS[2]]
        (problem,) = problems(path, 3)
        assert "line 2 of 1 damaged ones, step 2 of 1 missing ones" in problem
    path.write_text(json.dumps(SCORING | {"heldout_loss": float("inf")}))
    assert read(path) == []


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
