"""Give freed memory back to the system, so that a run on CPU takes what its tensors take.

glibc returns a freed block at once if it was mapped on its own, which blocks above a threshold are;
but it raises that threshold, up to 32 MiB, whenever such a block is freed. Activations then come
from a heap that does not shrink: steps of 1,024 tokens on a 100 M model held 1,445 to 1,648 MiB
instead of 910. Setting the threshold by hand keeps it where it is.
"""

import ctypes
import sys

MAP_ALONE_BYTES = 2**20
"""Blocks from here on are mapped on their own."""

_M_MMAP_THRESHOLD = -3


def give_back_freed_memory() -> bool:
    """Fix glibc's threshold for this process; False where there is no glibc and nothing is done."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, MAP_ALONE_BYTES) == 1
