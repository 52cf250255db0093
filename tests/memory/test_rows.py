"""The memory of tokenised rows and their batches, measured in a process of its own."""

import dataclasses
import subprocess
import sys

import pytest

from qlora_lite.memory.formulas import rows_bytes
from qlora_lite.memory.plan import with_rows
from tests.memory.test_plan import ON_CARD, plan_for

MEASURE = """
import gc, sys
import numpy as np
from qlora_lite.data.batches import Batches
from qlora_lite.data.examples import ExamplesBuilder
from qlora_lite.memory.measure import anonymous_bytes

def use(num_rows, mean, packing):
    rng = np.random.default_rng(0)
    builder = ExamplesBuilder()
    for i, n in enumerate(rng.integers(2, 2 * mean, num_rows)):
        builder.add([5] * int(n), [True] * int(n), i + 1)
    batches = Batches(builder.build(), max_tokens=1024, tokens_per_step=4096, packing=packing)
    batches.largest_batch()
    batches.step(0)
    batches._epoch_bins(1)
    return batches

num_rows, mean, packing = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
use(1000, mean, packing)
gc.collect()
before = anonymous_bytes()
batches = use(num_rows, mean, packing)
gc.collect()
print(batches.examples.num_tokens, anonymous_bytes() - before)
"""


@pytest.mark.parametrize(
    ("num_rows", "mean", "packing"),
    [(150_000, 16, True), (100_000, 16, False), (40_000, 400, True)],
)
def test_the_bytes_of_rows_are_those_measured(num_rows, mean, packing):
    command = [sys.executable, "-c", MEASURE, str(num_rows), str(mean), str(packing)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    num_tokens, measured = map(int, output.split())
    predicted = rows_bytes(num_tokens, num_rows, packing=packing)
    assert 0.5 * predicted < measured < 1.05 * predicted + 4 * 2**20


def test_a_plan_with_rows_needs_their_bytes_where_they_are():
    plan = plan_for(ON_CARD, "22GiB")
    num_bytes = rows_bytes(10**9, 10**6, packing=True)
    on_host = with_rows(plan, 10**9, 10**6, packing=True, is_cpu=False)
    assert on_host.peak_bytes == plan.peak_bytes
    assert on_host.ledger.host_bytes == plan.ledger.host_bytes + num_bytes
    on_cpu = with_rows(plan, 10**9, 10**6, packing=True, is_cpu=True)
    assert on_cpu.peak_bytes == plan.peak_bytes + num_bytes
    assert on_cpu.ledger.measured_bytes == plan.ledger.measured_bytes + num_bytes
    tight = dataclasses.replace(plan, budget_bytes=plan.peak_bytes + num_bytes - 1)
    assert tight.fits
    assert not with_rows(tight, 10**9, 10**6, packing=True, is_cpu=True).fits
