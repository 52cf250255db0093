"""Loading a base of about 1 GB, measured by the benchmark in fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHUNK_SCRATCH_BYTES = 20 * 2**20
"""8.5 times a chunk of 256 Ki weights in 16 bit for each thread, and some for the allocator."""


@pytest.mark.slow
def test_peak_memory_is_the_model_plus_at_most_one_tensor(tmp_path):
    results = tmp_path / "load.json"
    subprocess.run(
        [sys.executable, "tools/benchmark/load.py", "--repeats", "1", "--results", str(results)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    rows = json.loads(results.read_text())
    for num_shards in (1, 5):
        ours, theirs = (
            next(r for r in rows if (r["loader"], r["num_shards"]) == (loader, num_shards))
            for loader in ("qlora_lite", "transformers")
        )
        allowed = ours["largest_16bit_tensor_bytes"] + CHUNK_SCRATCH_BYTES
        assert ours["peak_bytes"] - ours["model_bytes"] <= allowed
        # processor time of one thread, so that other work on the machine does not count
        assert ours["cpu_seconds"] <= theirs["cpu_seconds"]
