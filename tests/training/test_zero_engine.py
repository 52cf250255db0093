"""Which weights a process holds under ZeRO-3. In a child process: DeepSpeed keeps its state."""

import json
import subprocess
import sys

import pytest

from tests.end_to_end.several import environment
from tests.end_to_end.small_run import recipe_in

SCRIPT = """
import json, sys
from pathlib import Path
from qlora_lite.foundation.partitioned import full_shape, is_partitioned
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.recipe import Recipe
from qlora_lite.run import job as jobs
from qlora_lite.run.training import run_recipe
from qlora_lite.training.zero_engine import ZeroEngine

found = {"between": [], "product": 0}
model = None

def live():
    return sum(p.numel() for p in model.parameters() if is_partitioned(p) and not p.requires_grad)

def watched(owner, name, before):
    original = getattr(owner, name)
    def call(*args, **options):
        if before and model is not None:
            before()
        return original(*args, **options)
    setattr(owner, name, call)

def note_product():
    found["product"] = max(found["product"], live())

def note_between():
    found["between"].append(live())

make = jobs.make_engine
def make_engine(setup, loaded, processes):
    global model
    engine = make(setup, loaded, processes)
    model = loaded.base.model
    blocks = model.model.layers
    numbers = lambda module: sum(
        full_shape(p)[0] * (full_shape(p) + (1,))[1] for p in module.parameters()
        if is_partitioned(p) and not p.requires_grad
    )
    found["block"] = max(map(numbers, blocks))
    found["head"] = numbers(model.lm_head)
    found["all"] = numbers(model)
    found["dtypes"] = sorted({str(p.dtype) for p in model.parameters()})
    return engine
jobs.make_engine = make_engine
watched(FrozenLinear, "pieces", note_product)
for name in ("backward", "step", "zero_grad"):
    watched(ZeroEngine, name, note_between)
run_recipe(Recipe.model_validate_json(Path(sys.argv[1]).read_text()))
Path(sys.argv[2]).write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(folder):
    """Numbers of frozen parameters that are in memory at several moments of a run."""
    recipe = recipe_in(folder, "watched", "optim.steps=4", "offload=zero3")
    asked, answered = folder / "watched.json", folder / "found.json"
    asked.write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", SCRIPT, str(asked), str(answered)]
    subprocess.run(command, check=True, env=environment(), timeout=300, capture_output=True)
    return json.loads(answered.read_text())


def test_no_frozen_weight_is_kept_from_forward_to_backward(found):
    assert found["between"]
    assert not any(found["between"])


def test_at_most_a_block_or_the_head_is_gathered_at_a_time(found):
    assert 0 < found["product"] <= max(found["block"], found["head"]) < found["all"]


def test_packed_weights_stay_bytes(found):
    assert "torch.uint8" in found["dtypes"]
