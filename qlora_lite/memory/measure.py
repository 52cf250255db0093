"""Measured memory: in use, peak, and available.

On CUDA these are PyTorch's counts; on CPU those of the operating system for this process. Resident
memory includes libraries and mapped files; anonymous memory does not.
"""

import os
import resource
import sys
import time
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def peak_bytes(device: torch.device) -> int:
    """Peak memory since the start or since `reset_peak`: of tensors on CUDA, resident memory of the
    process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Start measuring the peak again, for example after loading."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        # 5 resets VmHWM to the current value; see proc(5), /proc/pid/clear_refs
        Path("/proc/self/clear_refs").write_text("5")


def anonymous_bytes() -> int:
    """Memory of this process that is not backed by a file. Linux only."""
    return _status("RssAnon")


def resident_bytes() -> int:
    """Memory of this process now, 0 if it is not known."""
    return _status("VmRSS") if _STATUS.exists() else 0


def total_bytes(device: torch.device) -> int:
    """Total memory of the device; on CPU of the machine, or the container's limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = _meminfo("MemTotal")
    limit = _cgroup_number("memory.max")
    return total if limit is None else min(total, limit)


def available_bytes(device: torch.device) -> int:
    """What this process may use in total: what it uses now, plus what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = _meminfo("MemAvailable")
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is not None and used is not None:
        available = min(available, limit - used + _cgroup_cache())
    return available + resident_bytes()


def matmul_flops_per_second(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.2
) -> float:
    """Rate of large matrix products, measured for about `seconds`: an upper bound for training."""
    size = 4096 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    out = a @ a
    _synchronise(device)
    start, num = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(a, a, out=out)
        num += 1
        _synchronise(device)
    return 2 * size**3 * num / (time.perf_counter() - start)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(field: str) -> int:
    return _kibibytes(_STATUS, field)


def _meminfo(field: str) -> int:
    if not _MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _kibibytes(_MEMINFO, field)


def _kibibytes(file: Path, field: str) -> int:
    """A line such as `VmHWM:    12345 kB`, in bytes."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _cgroup_number(name: str) -> int | None:
    """A number of this container's cgroup (v2), or None if there is none."""
    file = _CGROUP / name
    text = file.read_text().strip() if file.exists() else "max"
    return None if text == "max" else int(text)


def _cgroup_cache() -> int:
    """Cached file pages of the container, which can be dropped."""
    lines = (_CGROUP / "memory.stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
