"""The benchmarks of a card, tried on a CPU with a tiny base."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmark" / "gpu.py"


@pytest.mark.slow
def test_zero_is_measured_with_every_place(tmp_path):
    results = tmp_path / "zero.json"
    words = ["zero", "--shape", "tiny", "--device", "cpu", "--max-tokens", "128"]
    subprocess.run([sys.executable, str(TOOL), *words, "--results", str(results)], check=True)
    runs = json.loads(results.read_text())["runs"]
    assert len(runs) == 4
    for run in runs.values():
        assert run["tokens_per_second"] > 0
        assert 0 < run["peak_bytes"] <= 1.01 * run["planned_bytes"]["device"]
