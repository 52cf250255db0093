"""The demo: it passes, and it fails when a claim does not hold."""

import os
import subprocess
import sys

import pytest
from rich.console import Console

from qlora_lite.demo import story
from qlora_lite.demo.story import BrokenClaim

QUIET = Console(quiet=True)


def events(*losses, start=31):
    return [{"step": start + i, "loss": loss, "seconds": i} for i, loss in enumerate(losses)]


def test_repeated_steps_must_be_the_same_to_the_last_bit():
    before = events(3.0, 2.5, 2.25)
    again = [dict(event, seconds=99.0) for event in before]
    story._check_resume(QUIET, before, [*again, *events(2.0, start=34)])
    with pytest.raises(BrokenClaim, match="differs from the killed one"):
        story._check_resume(QUIET, before, events(3.0, 2.5, 2.25 + 2**-40))


def test_a_resumed_run_without_repeated_steps_is_refused():
    with pytest.raises(BrokenClaim):
        story._check_resume(QUIET, events(3.0, start=30), events(3.0, start=30))


def test_the_held_out_loss_must_fall():
    def scorings(*losses):
        return [{"step": i, "heldout_loss": loss} for i, loss in enumerate(losses)]

    story._check_learning(QUIET, scorings(4.0, 3.0))
    with pytest.raises(BrokenClaim, match=r"from 4\.000 to 3\.900"):
        story._check_learning(QUIET, scorings(4.0, 3.9))


def test_a_demo_does_not_overwrite_another(tmp_path):
    names = [story._new_folder(tmp_path).name for _ in range(3)]
    assert names == ["story", "story-2", "story-3"]


@pytest.mark.slow
def test_the_demo_passes(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "qlora_lite", "demo"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for words in ("SIGKILL", "to the last bit", "resuming after step 30", "every check passed"):
        assert words in " ".join(result.stdout.split())
    assert (tmp_path / "runs" / "story" / "merged" / "model.safetensors").is_file()
