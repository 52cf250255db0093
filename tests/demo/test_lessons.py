"""Which base the demo uses, what it says about it, and which rows the real one is scored on."""

import json

import pytest

from qlora_lite.demo import BASE, HELDOUT, TRAIN, lessons
from qlora_lite.demo.lessons import (
    SCORED_ROWS,
    SHOWN,
    Lesson,
    checkpoint_every,
    choose_lesson,
    kill_after,
)
from qlora_lite.demo.pace import MOST_STEPS
from qlora_lite.demo.real_base import INSTALL
from qlora_lite.foundation.errors import BaseModelError


@pytest.fixture
def without_real_base(monkeypatch):
    monkeypatch.setattr(lessons, "find_real_base", lambda: None)


@pytest.fixture
def with_real_base(monkeypatch, tmp_path):
    monkeypatch.setattr(lessons, "find_real_base", lambda: tmp_path / "model.gguf")


def test_without_the_real_base_the_embedded_one_is_used_and_the_reason_given(without_real_base):
    lesson, why = choose_lesson("auto")
    assert lesson == Lesson(BASE, is_real=False)
    assert INSTALL in why
    assert "\n" not in why


def test_the_real_base_can_be_required(without_real_base):
    with pytest.raises(BaseModelError, match=INSTALL):
        choose_lesson("real")


@pytest.mark.parametrize("choice", ["auto", "real"])
def test_the_real_base_is_used_if_it_is_installed(with_real_base, tmp_path, choice):
    assert choose_lesson(choice) == (Lesson(str(tmp_path / "model.gguf"), is_real=True), "")


def test_the_embedded_base_is_used_on_request(with_real_base):
    assert choose_lesson("embedded") == (Lesson(BASE, is_real=False), "")


@pytest.mark.parametrize("steps", [8, 9, 12, 29, 48, 60])
def test_the_process_is_killed_between_two_checkpoints(steps):
    every = checkpoint_every(steps)
    assert 2 * every < kill_after(steps) <= min(3 * every, steps - 1)


def rows(file):
    return [json.loads(line) for line in open(file, encoding="utf-8")]


def test_the_real_base_is_scored_on_held_out_rows_and_the_shown_ones_are_first(tmp_path):
    recipe = Lesson("model.gguf", is_real=True).recipe(tmp_path, 20)
    scored = rows(recipe.data.heldout)
    questions = [row["messages"][0]["content"] for row in scored]
    assert len(set(questions)) == SCORED_ROWS
    assert tuple(questions[: recipe.evaluation.samples]) == SHOWN
    everything = rows(HELDOUT)
    assert all(row in everything for row in scored)


def test_the_real_base_trains_on_rows_of_the_data_and_no_row_twice(tmp_path):
    """A row has 55 tokens at the median."""
    trained = rows(Lesson("model.gguf", is_real=True).recipe(tmp_path, 20).data.train)
    everything = rows(TRAIN)
    assert all(row in everything for row in trained)
    assert len(trained) > MOST_STEPS * 1024 / 50
