"""The demo on both bases: it passes, and it fails when a claim does not hold."""

import os
import subprocess
import sys

import pytest
from rich.console import Console

from qlora_lite.cli.status import FAILED, status_of
from qlora_lite.demo import claims, story
from qlora_lite.demo.real_base import INSTALL
from qlora_lite.demo.story import run_demo

QUIET = Console(quiet=True)


def demo(folder, *arguments, environment=os.environ):
    return subprocess.run(
        [sys.executable, "-m", "qlora_lite", "demo", *arguments],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_demo_does_not_overwrite_another(tmp_path):
    names = [story._new_folder(tmp_path).name for _ in range(3)]
    assert names == ["story", "story-2", "story-3"]


def test_an_unknown_base_is_refused_with_the_known_ones(tmp_path):
    result = demo(tmp_path, "--base", "large")
    assert result.returncode == 2
    for name in ("auto", "real", "embedded"):
        assert name in result.stderr


def test_the_question_is_found_in_a_rendered_prompt():
    chatml = "system\nYou are user friendly.\nuser\nWhat does\nuser_call do?\nassistant\n"
    assert story._question(chatml) == "What does user_call do?"
    assert story._question("user\nWhat is int?\n") == "What is int?"


def test_a_claim_that_does_not_hold_fails_the_demo(tmp_path, monkeypatch, capfd):
    """With eight steps the resumed run is checked, and then a drop of the loss it cannot reach."""
    monkeypatch.setattr(claims, "MIN_LOSS_DROP", 0.99)
    printed = Console(width=200)
    assert status_of(lambda: run_demo(printed, "embedded", tmp_path, steps=8)) == FAILED
    output = capfd.readouterr()
    assert "steps 5 to 5 were lost and repeated" in output.out
    assert "check failed: the held-out loss fell too little" in output.err
    assert "Traceback" not in output.err
    assert not (tmp_path / "story" / "merged").exists()


@pytest.mark.slow
def test_the_demo_passes_on_the_embedded_base(tmp_path):
    result = demo(tmp_path, "--base", "embedded")
    assert result.returncode == 0, result.stderr
    printed = " ".join(result.stdout.split())
    for words in (
        "SIGKILL",
        "to the last bit",
        "resuming after step 30",
        "peak memory",
        "merged in fp32",
        "every check passed",
    ):
        assert words in printed
    assert INSTALL not in printed
    assert (tmp_path / "runs" / "story" / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.real
def test_the_demo_passes_on_the_real_base(real_base, tmp_path):
    """Its claims are checked inside, also the one about short answers."""
    folder = run_demo(QUIET, "real", tmp_path, steps=12)
    assert (folder / "merged" / "model.safetensors").is_file()
