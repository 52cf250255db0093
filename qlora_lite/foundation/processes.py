"""The processes that train one run: one, or several that a launcher started.

    with joined() as processes:
        rule = processes.from_main(choose_rule)

A launcher (torchrun, deepspeed, accelerate, or `--processes`) starts the same command several times
and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Process 0 is the main one: it
alone prints and writes files.

Methods marked collective are called by every process, in the same order.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from qlora_lite.foundation.errors import DeviceError
from qlora_lite.foundation.interrupts import ignore_signals

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_WAIT_SECONDS = 2.0
"""How long a process waits for what the others publish."""


class PeerError(Exception):
    """Another process of the run failed. It prints the error; this one only ends."""


@dataclass(frozen=True)
class Failure:
    """How a process of the run ended."""

    status: int
    message: str


@dataclass(frozen=True)
class Processes:
    """This process among all processes of a run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Number of this process on its machine: its card."""
    store: Any = None
    """Key-value store of all processes, for error messages. None in a single process."""
    launchers: tuple[int, ...] = ()
    """Process ids of the launcher: the parent of this process, and the parent of that."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher is gone."""
        return bool(self.launchers) and _ancestors(len(self.launchers)) != self.launchers

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process; the shares of all processes are disjoint."""
        return items[self.rank :: self.world]

    def sum(self, value: "torch.Tensor") -> "torch.Tensor":
        """The sum over all processes. Collective."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        total = value.clone()
        with _noticing_lost_peers():
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in a process. Collective."""
        if self.world == 1:
            return flag
        import torch

        return bool(self.sum(torch.tensor(int(flag))))

    def from_main(self, compute: Callable[[], T]) -> T:
        """The result of `compute` in the main process. Collective.

        Raises:
            PeerError: in the other processes, if `compute` fails.
        """
        if self.world == 1:
            return compute()
        import torch.distributed as dist

        message: list[Any] = [False, None]
        try:
            if self.is_main:
                message = [True, compute()]
        finally:
            with _noticing_lost_peers():
                dist.broadcast_object_list(message)
        succeeded, value = message
        if not succeeded:
            raise PeerError("the main process failed")
        return value

    def first_on_main(self, action: Callable[[], T]) -> T:
        """Run `action` in the main process, then in the others: they find what it wrote.
        Collective."""
        results: list[T] = []
        self.from_main(lambda: results.append(action()))
        return results[0] if self.is_main else action()

    def wait(self) -> None:
        """Return when every process has called this. Collective."""
        self.any(False)

    def publish(self, status: int, message: str) -> None:
        """Tell the other processes, and torchrun, how this one ends."""
        record_for_torchrun(message)
        if self.store is not None:
            with suppress(Exception):  # the store ends with the process that has it
                self.store.set(f"failed/{self.rank}", json.dumps([status, message]))

    def is_printed_by_main(self, message: str) -> bool:
        """Whether the main process fails with the same message, and prints it."""
        if self.store is None or self.is_main:
            return False
        failure = _until(lambda: self._failure_of(0))
        return failure is not None and failure.message == message

    def failure_of_another(self) -> Failure | None:
        """How the process ended whose end is the cause of a `PeerError`; None if it did not say."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        return _until(lambda: next(filter(None, map(self._failure_of, others)), None))

    def lost(self) -> list[int] | None:
        """The processes that are gone, found by the others, after a `PeerError`. None in all of
        these but the first, which reports it."""
        try:
            self.store.set(f"here/{self.rank}", "")
            _until(lambda: len(self._here()) >= self.world - 1 or None, 5 * _WAIT_SECONDS)
            here = self._here()
        except Exception:  # the main process has the store, or the launcher
            here = list(range(1, self.world))
        return [n for n in range(self.world) if n not in here] if self.rank == min(here) else None

    def _here(self) -> list[int]:
        return [rank for rank in range(self.world) if self.store.check([f"here/{rank}"])]

    def let_others_read(self, seconds: float = _WAIT_SECONDS) -> None:
        """Call before a failed process ends: the others stop waiting for it, and read why."""
        if self.store is None:
            return
        leaving = threading.Thread(target=_disconnect, daemon=True)
        leaving.start()
        with suppress(Exception):
            self.store.set(f"ended/{self.rank}", "")
            if self.is_main:  # often the store ends with it
                ended = [f"ended/{rank}" for rank in range(self.world)]
                _until(lambda: self.store.check(ended) or None, seconds)
        leaving.join(timeout=seconds / 2)

    def _failure_of(self, rank: int) -> Failure | None:
        try:
            if self.store.check([f"failed/{rank}"]):
                return Failure(*json.loads(self.store.get(f"failed/{rank}")))
        except Exception:  # the store is gone
            pass
        return None


_current = Processes()


def current() -> Processes:
    """The processes that this one has joined; itself alone, if it has joined none."""
    return _current


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ


def is_launched_as_other() -> bool:
    """Whether a launcher started this process, and not as the main one."""
    return is_launched() and os.environ["RANK"] != "0"


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that a launcher started. Without a launcher this does nothing.

    Raises:
        DeviceError: if the others are not found.
    """
    if not is_launched() or _current.world > 1:
        yield _current
        return
    import torch
    import torch.distributed as dist

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_card = torch.cuda.is_available()
    if has_card:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if has_card else "gloo"
    try:
        store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    except (ValueError, RuntimeError) as error:
        raise DeviceError(
            f"the processes of this run did not find each other: {str(error).splitlines()[0]}. "
            "Start all of them with one launcher, which sets RANK, WORLD_SIZE, LOCAL_RANK, "
            "MASTER_ADDR and MASTER_PORT"
        ) from error
    named = dist.PrefixStore("qlora_lite", store)
    _set(Processes(rank, world, local_rank, named, _launchers()))
    try:
        yield _current
    except SystemExit as end:  # how a command ends
        if end.code in (0, None):
            _leave()
        raise
    _leave()


def _leave() -> None:
    _current.wait()
    _disconnect()


def _disconnect() -> None:
    import torch.distributed as dist

    with suppress(Exception):
        if dist.is_initialized():
            dist.destroy_process_group()


def _set(processes: Processes) -> None:
    global _current  # noqa: PLW0603
    _current = processes


def _launchers() -> tuple[int, ...]:
    """The process ids of the launcher. Under deepspeed that is a command and its child, which goes
    on when the command is killed."""
    with suppress(OSError):
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        return _ancestors(2 if b"deepspeed.launcher.launch" in command else 1)
    return _ancestors(1)


def _ancestors(count: int) -> tuple[int, ...]:
    """The parent of this process, and the parent of that, on Linux."""
    ids = [os.getppid()]
    with suppress(OSError, IndexError):
        while len(ids) < count:
            after_name = Path(f"/proc/{ids[-1]}/stat").read_text().rpartition(")")[2]
            ids.append(int(after_name.split()[1]))
    return tuple(ids)


def end_process(status: int) -> NoReturn:
    """Exit. With several processes the interpreter is not unloaded: threads of the communication
    library crash in that ("terminate called without an active exception")."""
    if not is_launched():
        sys.exit(status)
    ignore_signals()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if status:
        _current.let_others_read()
    os._exit(status)


def record_for_torchrun(message: str) -> None:
    """Make the table with which torchrun ends show the message."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        more = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": more}}))


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone."""
    if _current.world == 1 or not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


@contextmanager
def _noticing_lost_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_lost_peer(error):
            raise PeerError(str(error).splitlines()[0]) from error
        raise


def _until(read: Callable[[], T | None], seconds: float = _WAIT_SECONDS) -> T | None:
    """The first result of `read` that is not None; None after so many seconds."""
    end = time.monotonic() + seconds
    while (result := read()) is None and time.monotonic() < end:
        time.sleep(0.05)
    return result
