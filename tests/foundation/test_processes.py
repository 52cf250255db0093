"""Several processes: who prints which error, who is gone, and how the rest ends."""

import os
import threading
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from qlora_lite.foundation.errors import DeviceError
from qlora_lite.foundation.processes import (
    Failure,
    Processes,
    is_launched,
    is_launched_as_other,
    joined,
    record_for_torchrun,
)
from tests.end_to_end.several import launch

ALL_OPERATIONS = """
import sys, torch
from qlora_lite.foundation.processes import PeerError, end_process, joined

def fail():
    raise ValueError("only the main process computes this")

with joined() as processes:
    rank = processes.rank
    assert processes.world == 2
    assert processes.sum(torch.tensor([rank + 1.0])).item() == 3
    assert processes.any(rank == 1) and not processes.any(False)
    assert processes.from_main(lambda: f"by {rank}") == "by 0"
    order = []
    processes.first_on_main(lambda: order.append(rank))
    assert order == [rank]
    try:
        processes.from_main(fail)
        assert False
    except (ValueError if rank == 0 else PeerError):
        pass
    processes.wait()
    print(f"process {rank} is done", flush=True)
end_process(0)
"""

GONE = """
import os
from qlora_lite.foundation.processes import end_process, joined, PeerError
with joined() as processes:
    processes.wait()
    if processes.rank == {rank}:
        os._exit(0)  # torchrun does not end the others
    try:
        processes.wait()
    except PeerError:
        assert processes.failure_of_another() is None
        print(f"found by {{processes.rank}}: {{processes.lost()}}", flush=True)
        end_process(0)
"""


def both() -> tuple[Processes, Processes]:
    """Two processes of a run that share a store."""
    store = dist.HashStore()
    return Processes(0, 2, store=store), Processes(1, 2, store=store)


def test_the_shares_of_all_processes_are_all_items():
    shares = [list(Processes(rank, 3).share(range(8))) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_the_main_one_and_waits_for_nobody():
    alone = Processes()
    assert alone.is_main
    assert alone.sum(torch.tensor(3)) == 3
    assert alone.any(True)
    assert alone.from_main(lambda: 5) == alone.first_on_main(lambda: 5) == 5
    assert not alone.is_orphan


@pytest.mark.parametrize(
    ("environment", "launched", "as_other"),
    [
        ({}, False, False),
        ({"WORLD_SIZE": "1", "RANK": "0"}, False, False),
        ({"WORLD_SIZE": "2"}, False, False),
        ({"WORLD_SIZE": "2", "RANK": "0"}, True, False),
        ({"WORLD_SIZE": "2", "RANK": "1"}, True, True),
    ],
)
def test_what_a_launcher_sets(monkeypatch, environment, launched, as_other):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_launched() is launched
    assert is_launched_as_other() is as_other


def test_a_launcher_that_does_not_say_where_the_others_are_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DeviceError, match="MASTER_ADDR"), joined():
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_process_is_an_orphan_when_one_of_its_launchers_changed():
    parent = os.getppid()
    grandparent = psutil.Process().parents()[1].pid
    assert not Processes(launchers=(parent,)).is_orphan
    assert not Processes(launchers=(parent, grandparent)).is_orphan
    assert Processes(launchers=(parent + 1,)).is_orphan
    assert Processes(launchers=(parent, grandparent + 1)).is_orphan


def test_the_same_error_is_printed_by_the_main_process_only():
    main, other = both()
    main.publish(2, "a wrong row")
    assert not main.is_printed_by_main("a wrong row")
    assert other.is_printed_by_main("a wrong row")
    assert not other.is_printed_by_main("no such file on this machine")


def test_a_process_learns_why_another_one_ended():
    main, other = both()
    other.publish(2, "no such file on this machine")
    assert main.failure_of_another() == Failure(2, "no such file on this machine")


def test_who_is_gone_is_found_by_those_who_are_left_and_reported_once():
    store = dist.HashStore()
    left = [Processes(rank, 3, store=store) for rank in (0, 2)]
    found: dict[int, list[int] | None] = {}
    threads = [threading.Thread(target=lambda p=p: found.update({p.rank: p.lost()})) for p in left]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [1], 2: None}


def test_torchrun_shows_the_message_of_a_failed_process(monkeypatch, tmp_path):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    record_for_torchrun("row 3 has no answer")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert failure.message["message"] == "row 3 has no answer"
    assert failure.timestamp > 0


def test_two_processes_agree_in_every_operation(tmp_path):
    script = tmp_path / "operations.py"
    script.write_text(ALL_OPERATIONS)
    result = launch(2, [str(script)])
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.split("\n")[:2]) == ["process 0 is done", "process 1 is done"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_vanishes_is_named_by_the_other(tmp_path, rank):
    script = tmp_path / "gone.py"
    script.write_text(GONE.format(rank=rank))
    result = launch(2, [str(script)])
    assert f"found by {1 - rank}: [{rank}]" in result.stdout, result.stderr
