"""Reuse freed memory for activations, and return the rest to the system. Linux with glibc only.

A block above glibc's mmap threshold is mapped separately: its memory is returned when it is freed,
and the next block costs a page fault for each 4 KiB. Below, blocks come from a heap and are reused,
but the heap only shrinks at its end. glibc raises the threshold up to 32 MiB by itself, as blocks
are freed, unless it is set.

Loading frees large blocks once, so there the threshold is low. Training allocates the activations
of a layer again and again, so there it is above the largest of them. Small blocks that stay, such
as nodes of the graph, then keep the freed memory of a layer from being used for the next one: the
heap of a forward grows by the temporary memory of each layer. So it is trimmed every few layers,
forward and backward, and before the loss, whose logits are too large for the heap.

A step of SmolLM2-135M (512 tokens, fp32, one core), with 30 layers of 11 MiB:

| threshold           | page faults | CPU seconds | of these in the kernel | peak MiB       |
|---------------------|-------------|-------------|------------------------|----------------|
| 1 MiB               | 1,420,000   | 8.6         | 2.4                    | 944            |
| 4 MiB               | 100,000     | 6.3         | 0.2                    | 1,380 to 1,480 |
| 4 MiB, trimmed      | 340,000     | 6.2         | 0.6                    | 963            |
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

LOADING_THRESHOLD_BYTES = 2**20
LARGEST_THRESHOLD_BYTES = 2**25
"""glibc accepts no more."""
_ALIGNMENT_BYTES = 4096
"""More than torch's alignment and glibc's header add to a block."""

FREED_BYTES = 64 * 2**20
"""Freed memory that the heap may hold before it is trimmed."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def give_back_freed_memory() -> bool:
    """Return large blocks to the system when they are freed, and what was freed until now.

    Returns False if there is no glibc.
    """
    return _set(LOADING_THRESHOLD_BYTES, trim_bytes=2**17)


def reuse_freed_memory(largest_bytes: int) -> bool:
    """Reuse freed blocks of up to `largest_bytes`, at most 32 MiB. False if there is no glibc."""
    threshold = max(largest_bytes + _ALIGNMENT_BYTES, LOADING_THRESHOLD_BYTES)
    return _set(min(threshold, LARGEST_THRESHOLD_BYTES), trim_bytes=LARGEST_THRESHOLD_BYTES)


def trimmer(freed_bytes: int) -> Callable[[], None]:
    """A function to call before each layer and before the loss: it returns the freed memory when
    that may be `FREED_BYTES`.

    Args:
        freed_bytes: what a layer leaves behind.
    """
    period, calls = max(FREED_BYTES // max(freed_bytes, 1), 1), 0

    def trim() -> None:
        nonlocal calls
        calls += 1
        if calls % period == 0 and (libc := _glibc()):
            libc.malloc_trim(0)

    return trim


def _set(mmap_bytes: int, trim_bytes: int) -> bool:
    libc = _glibc()
    if libc is None:
        return False
    is_set = libc.mallopt(_M_MMAP_THRESHOLD, mmap_bytes)
    is_set &= libc.mallopt(_M_TRIM_THRESHOLD, trim_bytes)
    libc.malloc_trim(0)
    return bool(is_set)


@cache
def _glibc() -> Any:
    """The C library, or None if it is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
