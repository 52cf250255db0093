"""The processes that train one run: one, or several that a launcher started.

    with joined() as processes:
        rule = processes.from_main(choose_rule)

A launcher (torchrun, deepspeed, accelerate, or `--processes`) starts the same command several times
and sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Process 0 is the main one: it
alone prints and writes files.

Methods marked collective are called by every process, in the same order.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_WAIT_SECONDS = 2.0
"""How long a process waits for the error of the main one before it prints its own."""


class PeerError(Exception):
    """Another process of the run failed. It prints the error; this one only ends."""


@dataclass(frozen=True)
class Processes:
    """This process among all processes of a run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Number of this process on its machine: its card."""
    store: Any = None
    """Key-value store of all processes, for error messages. None in a single process."""
    launcher: int | None = None
    """Process id of the launcher."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher is gone."""
        return self.launcher is not None and os.getppid() != self.launcher

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

    def publish(self, error: str) -> bool:
        """Tell the others about an error. Returns whether this process should print it: the same
        error of every process is printed once, by the main one."""
        if self.store is None:
            return True
        with suppress(Exception):  # the store ends with the process that has it
            self.store.set(f"error/{self.rank}", error)
            if self.is_main:
                return True
            end = time.monotonic() + _WAIT_SECONDS
            while time.monotonic() < end:
                if self.store.check(["error/0"]):
                    return bool(self.store.get("error/0").decode() != error)
                time.sleep(0.05)
        return True


_current = Processes()


def current() -> Processes:
    """The processes that this one has joined; itself alone, if it has joined none."""
    return _current


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that a launcher started. Without a launcher this does nothing."""
    if not is_launched() or _current.world > 1:
        yield _current
        return
    import torch
    import torch.distributed as dist

    store, rank, world = next(dist.rendezvous("env://"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    has_card = torch.cuda.is_available()
    if has_card:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if has_card else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    _set(Processes(rank, world, local_rank, dist.PrefixStore("qlora_lite", store), os.getppid()))
    try:
        yield _current
    except SystemExit as end:  # how a command ends
        if end.code in (0, None):
            _leave()
        raise
    _leave()


def _leave() -> None:
    import torch.distributed as dist

    _current.wait()
    dist.destroy_process_group()


def _set(processes: Processes) -> None:
    global _current  # noqa: PLW0603
    _current = processes


def end_process(status: int) -> NoReturn:
    """Exit. With several processes the interpreter is not unloaded: threads of the communication
    library crash in that ("terminate called without an active exception")."""
    if not is_launched():
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if status and _current.is_main:
        time.sleep(_WAIT_SECONDS / 2)  # the others read its error from its store
    os._exit(status)


@contextmanager
def _noticing_lost_peers() -> Iterator[None]:
    """A collective operation fails when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError(f"another process is gone ({str(error).splitlines()[0]})") from error
