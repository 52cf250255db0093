"""Ctrl-C and a closed terminal, in real processes."""

import json
import os
import pty
import signal
import sys
import time

import pytest

from tests.cli.workplace import start_process

GO = "from qlora_lite.cli import main; print('go', flush=True); main({arguments!r})"
LINE = "interrupted: stopped from the keyboard"

STUCK = """
import hashlib
from qlora_lite.training import loop
def stuck(job, progress):
    print("stuck", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # no signal handler runs meanwhile
loop._one_step = stuck
"""


def start(*arguments, before=""):
    """The command in a process that has reached our code."""
    program = before + GO.format(arguments=[str(argument) for argument in arguments])
    process = start_process("-c", program)
    read_until(process, "go")
    return process


def read_until(process, text):
    while text not in (line := process.stdout.readline()):
        assert line or process.poll() is None, process.stderr.read()


def assert_interrupted(process, seconds=2.5, line=LINE):
    """One second is promised; the machine may be busy."""
    begun = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - begun < seconds
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == line
    assert "Traceback" not in err
    assert err.count("interrupted") == 1


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.5])
def test_ctrl_c_while_the_command_is_starting(recipe, delay):
    process = start("train", recipe)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    assert_interrupted(process)


def test_ctrl_c_while_rows_are_read(recipe, tmp_path):
    row = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "train.jsonl").write_text(f"{row}\n" * 100_000, encoding="utf-8")
    process = start("train", recipe, "data.max_rows=null")
    read_until(process, "linear layers in")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert_interrupted(process)
    assert not (tmp_path / "run" / "recipe.json").exists()


SWALLOWED = """
import sys, time, types
import qlora_lite.recipe_files
def __getattr__(name):
    if name != "load_with_settings":
        raise AttributeError(name)
    text = "importing"
    while True:
        try:
            print(text, flush=True)
            text = ""
            time.sleep(60)
        except BaseException:
            pass  # as an import in numpy does
stuck = types.ModuleType("qlora_lite.recipe_files")
stuck.__getattr__ = __getattr__
sys.modules["qlora_lite.recipe_files"] = stuck
"""


def test_sigterm_that_an_import_swallows_ends_with_one_line(recipe):
    process = start("plan", recipe, before=SWALLOWED)
    read_until(process, "importing")
    process.send_signal(signal.SIGTERM)
    assert_interrupted(process, line="interrupted: stopped by SIGTERM")


def test_the_first_signal_in_training_is_acknowledged_at_once(recipe):
    process = start("train", recipe, before=STUCK)
    read_until(process, "stuck")
    process.send_signal(signal.SIGTERM)
    while "stopping after this step" not in (text := process.stderr.readline()):
        assert text
    process.kill()
    process.communicate()


def test_a_second_ctrl_c_ends_a_step_that_takes_for_ever(recipe):
    process = start("train", recipe, before=STUCK)
    read_until(process, "stuck")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # the first one waits for the step
    process.send_signal(signal.SIGINT)
    assert_interrupted(process)


def test_ctrl_c_in_a_destructor_prints_no_traceback(recipe):
    program = """
import os, signal
class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
from qlora_lite.cli import status
status.prepare_process = lambda: Slow()
"""
    assert_interrupted(start("plan", recipe, before=program))


def status_of(child: int, seconds: float) -> int:
    """The exit status of a child process, which is killed if it does not end in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the process did not end within {seconds} s")


def test_a_closed_terminal_saves_the_state_and_ends_with_130(recipe, tmp_path):
    rarely = ["checkpoints.every=3000", "evaluation.every=3000", "optim.steps=3000"]
    command = [sys.executable, "-m", "qlora_lite", "train", str(recipe), *rarely]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup around pytest would be inherited
        os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "run" / "metrics.jsonl"
    os.set_blocking(terminal, False)
    deadline = time.monotonic() + 120
    while not metrics.exists() or '"step": 3,' not in metrics.read_text():
        assert time.monotonic() < deadline
        try:
            os.read(terminal, 65536)
        except BlockingIOError:
            time.sleep(0.02)
    os.close(terminal)
    assert status_of(child, seconds=60) == 130
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert saved.name == f"step-{steps[-1]:06d}"
