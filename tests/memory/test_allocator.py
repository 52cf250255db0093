"""Freed memory is reused or returned to the system."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is the allocator of Linux")

START = """
import resource, sys
from qlora_lite.memory.allocator import (
    FREED_BYTES, give_back_freed_memory, reuse_freed_memory, trimmer
)

def anonymous_mebibytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024

def block(mebibytes):
    return bytearray(b"x") * (mebibytes << 20)
"""

LOADING = """
if sys.argv[1] == "fixed":
    assert give_back_freed_memory()
del_me = block(30)
del del_me  # from here on glibc would take blocks of this size from its heap
before = anonymous_mebibytes()
blocks = [block(8) for _ in range(20)]
kept = blocks[-1]
del blocks
print(anonymous_mebibytes() - before)
"""

PAGE_FAULTS = """
if sys.argv[1] == "reused":
    assert reuse_freed_memory(4 << 20)
else:
    assert give_back_freed_memory()
faults = -resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    block(4)
print(faults + resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""

TRIMMING = """
assert reuse_freed_memory(4 << 20)
before = anonymous_mebibytes()
trim = trimmer(FREED_BYTES // 2)
blocks = [block(4) for _ in range(20)]
kept = blocks[-1]
del blocks
sizes = [anonymous_mebibytes() - before]
for _ in range(2):
    trim()
    sizes.append(anonymous_mebibytes() - before)
print(*sizes)
"""

LARGE = """
assert reuse_freed_memory(10**12)
"""


def run(code, *arguments):
    command = [sys.executable, "-c", START + code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(number) for number in result.stdout.split()]


def test_memory_below_a_block_in_use_is_returned():
    (by_default,), (fixed,) = run(LOADING, "default"), run(LOADING, "fixed")
    assert fixed == pytest.approx(8, abs=2)
    assert by_default > 100


def test_a_freed_block_is_reused_without_page_faults():
    (returned,), (reused,) = run(PAGE_FAULTS, "returned"), run(PAGE_FAULTS, "reused")
    assert returned >= 100 * 1024  # each page of each block
    assert reused < 3 * 1024


def test_memory_below_a_block_in_use_is_returned_when_the_layers_left_enough():
    at_first, after_one_layer, after_two = run(TRIMMING)
    assert at_first >= 75
    assert after_one_layer >= 75
    assert after_two == pytest.approx(4, abs=2)


def test_the_largest_threshold_of_glibc_is_kept():
    run(LARGE)


def test_products_of_many_shapes_leave_no_memory_behind():
    """oneDNN would keep the code of every shape: 0.2 MiB for each."""
    script = (
        "import qlora_lite, torch, resource\n"
        "def products(start, stop):\n"
        "    for rows in range(start, stop):\n"
        "        torch.ones(rows, 64, dtype=torch.bfloat16) @ torch.ones(64, 64).bfloat16()\n"
        "products(1, 20)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "products(20, 420)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown_kib = int(subprocess.check_output([sys.executable, "-c", script], text=True))
    assert grown_kib < 16 * 1024
