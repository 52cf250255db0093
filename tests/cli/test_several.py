"""A command in several processes: words, refusals, and how `--processes` ends."""

import signal
import sys
import time

import pytest

from qlora_lite.cli.script import without_count
from qlora_lite.cli.several import require_one_process, start_processes, without_local_rank
from qlora_lite.foundation.errors import RecipeError
from tests.cli.workplace import run_command, start_process

START = """
import sys
from qlora_lite.cli.several import start_processes
sys.exit(start_processes(2, ["-c", {code!r}]))
"""


def start(code: str):
    """`code` in two processes that `--processes` starts."""
    return start_process("-c", START.format(code=code))


@pytest.mark.parametrize("word", ["--local_rank=0", "--local-rank=13"])
def test_what_deepspeed_appends_is_dropped(word):
    assert without_local_rank([word, "train", "recipe.py"]) == ["train", "recipe.py"]


def test_other_words_are_kept():
    words = ["train", "--local", "optim.lr=1", "--local_rank=x"]
    assert without_local_rank(words) == words


def test_the_processes_are_not_told_to_start_processes(monkeypatch):
    words = ["--processes", "2", "optim.lr=1", "--processes=2", "--extend"]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    assert without_count() == ["optim.lr=1", "--extend"]


def test_only_train_runs_in_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    require_one_process(["train", "recipe.py"])
    require_one_process(["--help"])
    with pytest.raises(RecipeError, match=r"2 processes for `merge`.*without a launcher"):
        require_one_process(["merge", "run", "out"])


def test_processes_are_not_started_by_each_process_of_a_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RecipeError, match="--processes 2 under a launcher"):
        start_processes(2, ["-c", "pass"])


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_a_count_that_is_none_has_status_2(recipe, count):
    ended = run_command("train", recipe, "--processes", count)
    assert ended.status == 2
    assert "--processes" in ended.err


def test_all_that_end_well_have_status_0_and_one_thread_per_core():
    code = (
        "import os\n"
        "words = os.environ['RANK'], os.environ['OMP_NUM_THREADS']\n"
        "os.write(1, (' '.join(words) + '\\n').encode())"
    )
    process = start(code)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, sorted(out.splitlines()), err) == (0, ["0 1", "1 1"], "")


def test_the_status_is_that_of_the_process_that_failed_first():
    code = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(3); time.sleep(60)"
    process = start(code)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (3, "")


def test_a_killed_process_is_named_in_one_line():
    code = "import os, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(60)"
    process = start(code)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err == ("error: process 1 was ended by SIGKILL. The same command continues the run\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_reaches_every_process_and_ends_with_130(number):
    code = (
        "import os, signal, sys, time\n"
        "def save(number, frame):\n"
        "    os.write(1, b'saved\\n')\n"
        "    sys.exit(130)\n"
        "for n in (2, 15): signal.signal(n, save)\n"
        "os.write(1, b'ready\\n')\n"
        "time.sleep(60)"
    )
    process = start(code)
    for _ in range(2):
        assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.split(), err) == (130, ["saved", "saved"], "")
