"""Every launcher: it trains what one process trains, stops on signals, and survives killed ones."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cli.workplace import run_command, write_recipe
from tests.end_to_end.several import environment
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
SECONDS = 400
PLAIN = ["optim.steps=30", "optim.micro_batch_tokens=128", "adapter.dtype=fp32"]
SETTINGS = [*PLAIN, "offload=zero2"]
"""Adapters in fp32, as under ZeRO."""
STEP = "training step"


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(*words: str) -> list[str]:
    return [f"{BIN}/torchrun", "--standalone", "--nproc_per_node=2", "-m", "qlora_lite", *words]


def deepspeed(*words: str) -> list[str]:
    options = ["-q", "--num_accelerators=2", f"--master_port={free_port()}"]
    return [f"{BIN}/deepspeed", *options, "--module", "qlora_lite", *words]


def accelerate(*words: str) -> list[str]:
    options = ["--use_deepspeed", "--num_processes=2", "--num_machines=1"]
    options += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    return [f"{BIN}/accelerate", "launch", *options, "-m", "qlora_lite", *words]


def processes(*words: str) -> list[str]:
    return [sys.executable, "-m", "qlora_lite", *words, "--processes=2"]


Launcher = Callable[..., list[str]]
LAUNCHERS: list[Launcher] = [torchrun, deepspeed, accelerate, processes]
STATUS_OF_FAILURE = {torchrun: 1, deepspeed: 2, accelerate: 1, processes: 2}
each_launcher = pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda f: f.__name__)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launchers")
    return write_recipe(folder, save_tiny(folder / "llama", "llama"))


@pytest.fixture(scope="module")
def one_process(recipe, tmp_path_factory):
    """The losses of the run without a launcher."""
    output = tmp_path_factory.mktemp("one") / "run"
    ended = run_command("train", recipe, f"output={output}", *PLAIN)
    assert ended.status == 0, ended.err
    return losses(output)


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def start(command: list[str]) -> subprocess.Popen[str]:
    more = {"DS_ACCELERATOR": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment() | more)


def read_until(process: subprocess.Popen[str], text: str) -> None:
    while text not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that train, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        rank = child.environ().get("RANK")
        if rank is not None and "qlora_lite" in child.cmdline():
            found.setdefault(int(rank), child)
    return found


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def train(launcher: Launcher, recipe: Path, output: Path) -> tuple[int, str, str]:
    return finish(start(launcher("train", str(recipe), f"output={output}", *SETTINGS)))


@each_launcher
def test_it_trains_what_one_process_trains_and_one_of_them_prints(
    launcher, recipe, one_process, tmp_path
):
    status, out, err = train(launcher, recipe, tmp_path / "run")
    assert status == 0, err
    assert losses(tmp_path / "run") == pytest.approx(one_process, rel=1e-4)
    assert out.count("adapter: ") == out.count(f"{STEP} 1/30") == 1
    assert "Traceback" not in err
    if launcher is processes:
        assert err == ""


@each_launcher
def test_an_error_is_printed_once(launcher, recipe, tmp_path):
    status, _, err = finish(start(launcher("train", str(recipe), "optim.learning=1")))
    assert status == STATUS_OF_FAILURE[launcher]
    assert sum(line.startswith("error: optim.learning") for line in err.splitlines()) == 1
    if launcher is processes:
        assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("who", ["launcher", 0, 1])
@each_launcher
def test_a_signal_saves_and_the_same_command_continues(
    launcher, who, number, recipe, one_process, tmp_path
):
    if who != "launcher" and (number == signal.SIGINT or launcher is accelerate):
        pytest.skip("as for SIGTERM, and as for torchrun")
    process = start(launcher("train", str(recipe), f"output={tmp_path / 'run'}", *SETTINGS))
    read_until(process, STEP)
    all_ranks = ranks_of(process)
    begun = time.monotonic()
    target = process.pid if who == "launcher" else all_ranks[who].pid
    psutil.Process(target).send_signal(number)
    status, _, err = finish(process)
    _, alive = psutil.wait_procs(all_ranks.values(), timeout=60)
    assert not alive
    assert time.monotonic() - begun < 60  # 20 on an idle machine
    assert status != 0
    assert err.count("with its state saved") >= 1
    if launcher is processes:
        assert status == 130
        assert "Traceback" not in err
        assert err.count("interrupted") == 1
    status, out, err = train(launcher, recipe, tmp_path / "run")
    assert status == 0, err
    assert f"{STEP} 1/30" not in out
    assert losses(tmp_path / "run") == pytest.approx(one_process, rel=1e-4)


@pytest.mark.parametrize("when", ["loading", "training"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", [torchrun, deepspeed, processes], ids=lambda f: f.__name__)
def test_a_killed_process_ends_the_others_and_the_same_command_continues(
    launcher, rank, when, recipe, one_process, tmp_path
):
    process = start(launcher("train", str(recipe), f"output={tmp_path / 'run'}", *SETTINGS))
    read_until(process, STEP if when == "training" else "peak")
    all_ranks = ranks_of(process)
    all_ranks[rank].kill()
    begun = time.monotonic()
    status, _, err = finish(process)
    assert time.monotonic() - begun < 60
    assert not psutil.wait_procs(all_ranks.values(), timeout=10)[1]
    assert status != 0
    assert "this is a bug" not in err
    if launcher is processes:
        lines = [line for line in err.splitlines() if line.startswith("error")]
        assert lines == [
            f"error: process {rank} was ended by SIGKILL. The same command continues the run"
        ]
    status, _, err = train(launcher, recipe, tmp_path / "run")
    assert status == 0, err
    assert losses(tmp_path / "run") == pytest.approx(one_process, rel=1e-4)


@pytest.mark.parametrize("launcher", [torchrun, deepspeed, processes], ids=lambda f: f.__name__)
def test_processes_whose_launcher_is_gone_save_and_stop(launcher, recipe, tmp_path):
    process = start(launcher("train", str(recipe), f"output={tmp_path / 'run'}", *SETTINGS))
    read_until(process, STEP)
    all_ranks = ranks_of(process)
    process.kill()
    assert not psutil.wait_procs(all_ranks.values(), timeout=60)[1]
    assert "the end of its launcher" in process.communicate(timeout=60)[1]
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def agents_of_torchrun(words: list[str], folder: Path) -> list[list[str]]:
    common = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    common += [f"--master_port={free_port()}", "-m", "qlora_lite", *words]
    return [[f"{BIN}/torchrun", f"--node_rank={rank}", *common] for rank in (0, 1)]


def agents_of_deepspeed(words: list[str], folder: Path) -> list[list[str]]:
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    common = ["-q", f"--hostfile={hostfile}", "--no_ssh", "--master_addr=127.0.0.1"]
    common += [f"--master_port={free_port()}", "--module", "qlora_lite", *words]
    return [[f"{BIN}/deepspeed", f"--node_rank={rank}", *common] for rank in (0, 1)]


@pytest.mark.parametrize("agents", [agents_of_torchrun, agents_of_deepspeed])
def test_two_machines_train_what_one_process_trains(agents, recipe, one_process, tmp_path):
    words = ["train", str(recipe), f"output={tmp_path / 'run'}", *SETTINGS]
    both = [start(command) for command in agents(words, tmp_path)]
    ends = [finish(process) for process in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert losses(tmp_path / "run") == pytest.approx(one_process, rel=1e-4)
    assert [out.count("adapter: ") for _, out, _ in ends] == [1, 0]
