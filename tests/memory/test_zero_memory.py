"""Memory of every process under ZeRO: what was measured, against the plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig
from zero import Measurements, recipe_of

from qlora_lite.foundation.device import choose
from qlora_lite.run.planning import plan_memory
from qlora_lite.run.setup import set_up

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "docs" / "benchmarks" / "zero.json").read_text(encoding="utf-8"))
KINDS = ("base", "trained", "states")
LOADING_SCRATCH_BYTES = 20 * 2**20
"""As in `tests/model/test_load_memory.py`."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The config of the measured base."""
    folder = tmp_path_factory.mktemp("base")
    LlamaConfig(**RECORD["settings"]["base"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "run", RECORD["runs"], ids=lambda run: f"{run['stage']}-{run['processes']}"
)
def test_the_plan_is_within_5_percent_of_the_tensors_that_were_measured(base, tmp_path, run):
    setup = set_up(recipe_of(base, run["stage"], tmp_path / "run"), choose("cpu"))
    watcher = Measurements()
    watcher.planned(plan_memory(setup, processes=run["processes"]))
    planned = watcher.found["planned"]
    for process in run["by_process"]:
        for kind in KINDS:
            assert planned[kind] == pytest.approx(process["measured"][kind], rel=0.05), kind
        assert process["measured"]["peak"] <= 1.01 * planned["peak"]


@pytest.mark.slow
def test_every_process_has_its_share_also_while_loading(tmp_path):
    results = tmp_path / "zero.json"
    subprocess.run(
        [
            *(sys.executable, "tools/benchmark/zero.py", "--stages", "zero3"),
            *("--results", str(results)),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    alone, two = json.loads(results.read_text())["runs"]
    (whole,) = alone["by_process"]
    shape = RECORD["settings"]["base"]
    largest = 2 * shape["vocab_size"] * shape["hidden_size"]
    for process in two["by_process"]:
        for kind in KINDS:
            measured, planned = process["measured"][kind], process["planned"][kind]
            assert planned == pytest.approx(measured, rel=0.05), kind
        share = process["measured"]["base"]
        assert process["loading_peak"] <= share + largest + LOADING_SCRATCH_BYTES
        assert process["loading_peak"] < whole["loading_peak"]
