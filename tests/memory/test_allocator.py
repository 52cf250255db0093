"""Freed memory is returned to the system."""

import subprocess
import sys

import pytest

STEP = """
import sys
from qlora_lite.memory.allocator import give_back_freed_memory

def anonymous_mebibytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024

if sys.argv[1] == "fixed":
    assert give_back_freed_memory()
del_me = bytearray(b"x") * (30 << 20)
del del_me  # from here on glibc would take blocks of this size from its heap
before = anonymous_mebibytes()
blocks = [bytearray(b"x") * (8 << 20) for _ in range(20)]
kept = blocks[-1]
del blocks
print(anonymous_mebibytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is the allocator of Linux")
def test_memory_below_a_block_in_use_is_returned():
    growth = {}
    for mode in ("default", "fixed"):
        command = [sys.executable, "-c", STEP, mode]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        growth[mode] = int(result.stdout)
    assert growth["fixed"] == pytest.approx(8, abs=2)
    assert growth["default"] > 100
