"""Two processes train what one trains: plainly, and with every stage of DeepSpeed ZeRO.

All recipes of this file run in one launch of two processes, because importing takes longer than
training. The reference is the same recipe in this process.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from tests.end_to_end.several import train_in_processes
from tests.end_to_end.small_run import recipe_in, small_recipe, write_rows
from tests.properties.cases import CASES
from tests.tiny import save_tiny

STAGES = {
    "plain": (),
    "zero1": ("offload=zero1",),
    "zero2": ("offload=zero2", "offload.optimizer=cpu"),
    "zero3": ("offload=zero3", "offload.optimizer=cpu", "offload.parameters=cpu"),
}
LR = 5e-3
SHORT = (
    *("optim.steps=4", "optim.micro_batch_tokens=64", "data.max_tokens=64"),
    *("data.heldout_share=0.2", "evaluation.every=2", "checkpoints.every=2"),
    "optim.weight_decay=0.1",
)
"""Four micro-batches per step. Weight decay would move a layer that rests."""

LORA = (*SHORT, "adapter.dtype=fp32", "adapter.lr_ratio=4")
"""With dropout; in fp32, as under ZeRO; with two groups of the optimizer."""

HEAD = (
    *(*SHORT, "optim.tokens_per_step=192", "adapter=prilora", "adapter.prune_every=3"),
    *("adapter.dtype=fp32", 'adapter.train_modules=["lm_head"]', "evaluation.samples=1"),
)
"""Three micro-batches per step, so that a process has a filler, which must not count in PRILoRA's
averages; a module that is replaced, and runs while the adapter is off."""

METHODS = ("adalora", "xgblora", "mora, restarted", "dora")
"""In the ordinary suite, of all cases: budget and gates, resting layers, restarts and matrices of
odd size, dense base weights. With dropout there is LoRA in `STAGES`."""


def method_recipe(folder, name, output, *changes):
    settings = CASES[name].model_settings.model_copy(update={"dtype": "fp32"})
    return recipe_in(
        folder, output, *SHORT, f"adapter={json.dumps(settings.model_dump(mode='json'))}", *changes
    )


@pytest.fixture(scope="module")
def recipes(folder):
    """Everything that runs in two processes, by name."""
    found = {stage: recipe_in(folder, stage, *LORA, *changes) for stage, changes in STAGES.items()}
    for name in METHODS:
        found[name] = method_recipe(folder, name, f"{name}-zero3", "offload=zero3")
    for quant in ("int8", "bf16", "fp32"):
        changes = (f"base.quant={quant}", "offload=zero3")
        found[quant] = recipe_in(folder, f"{quant}-zero3", *LORA, *changes)
    trained = ("adapter.train_norms=true", "adapter.embedding_rank=2", "offload=zero3")
    found["norms"] = recipe_in(folder, "norms-zero3", *LORA, *trained)
    best = ("evaluation.patience=2", "offload=zero3")
    found["best"] = recipe_in(folder, "best-zero3", *LORA, *best)
    found["head"] = recipe_in(folder, "head-zero3", *HEAD, "offload=zero3")
    if find_spec("tensorboard"):
        found["zero1"] = found["zero1"].but('tracking=["tensorboard"]')
    return found


@pytest.fixture(scope="module")
def two_processes(folder, recipes):
    """Errors of the recipes in two processes; then resumed runs, which stopped at step 2 in one
    process under another engine."""
    for name in ("plain", "zero2", "zero3"):
        stopped_after_two_steps(folder, f"resumed-{name}")
    resumed = {
        f"resumed-{name}": recipe_in(folder, f"resumed-{name}", *LORA, *STAGES[name])
        for name in ("plain", "zero2", "zero3")
    }
    every = recipes | resumed
    return train_in_processes(2, {name: r.to_dict() for name, r in every.items()}, folder)


def stopped_after_two_steps(folder, output, *changes):
    """A run of one process that was killed after step 2."""
    run_recipe(recipe_in(folder, output, *LORA, *changes))
    forget_the_end(folder / output)


@pytest.fixture(scope="module")
def one_process(folder):
    """The reference of a name; each is trained once."""
    done = set()

    def train(name, *changes):
        output = f"{name}-one"
        if output not in done:
            if name in CASES and name != "lora":
                run_recipe(method_recipe(folder, name, output, *changes))
            else:
                run_recipe(recipe_in(folder, output, *LORA, *changes))
            done.add(output)
        return folder / output

    return train


def numbers(run):
    """Losses and gradient norms of a run, in order."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "heldout_loss", "grad_norm")
    return torch.tensor([e[n] for e in events for n in names if n in e], dtype=torch.float64)


def assert_same(run, reference):
    """The same losses to fp32 rounding; the same adapter to a fraction of a step. Adam turns a
    gradient that is only rounding into a whole step, so single numbers may differ by more."""
    torch.testing.assert_close(numbers(run), numbers(reference), rtol=3e-6, atol=0)
    ours = load_file(run / "adapter" / "native.safetensors")
    theirs = load_file(reference / "adapter" / "native.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        difference = (value.float() - theirs[name].float()).abs()
        assert (difference < LR).all(), name
        assert difference.sum() <= 1e-3 * LR * difference.numel(), name


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_what_one_trains(folder, two_processes, one_process, stage):
    assert two_processes[stage] is None
    assert_same(folder / stage, one_process("lora"))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_same_when_the_base_is_divided(folder, two_processes, one_process, name):
    assert two_processes[name] is None
    assert_same(folder / f"{name}-zero3", one_process(name))


@pytest.mark.parametrize("quant", ["int8", "bf16", "fp32"])
def test_every_precision_can_be_divided(folder, two_processes, one_process, quant):
    assert two_processes[quant] is None
    assert_same(folder / f"{quant}-zero3", one_process(quant, f"base.quant={quant}"))


def test_norms_and_embeddings_are_trained_when_the_base_is_divided(
    folder, two_processes, one_process
):
    assert two_processes["norms"] is None
    changes = ("adapter.train_norms=true", "adapter.embedding_rank=2")
    assert_same(folder / "norms-zero3", one_process("norms", *changes))


def test_early_stopping_restores_the_best_adapter_when_the_base_is_divided(
    folder, two_processes, one_process
):
    assert two_processes["best"] is None
    assert_same(folder / "best-zero3", one_process("best", "evaluation.patience=2"))


def test_a_trained_head_is_the_same_when_the_base_is_divided(folder, two_processes):
    assert two_processes["head"] is None
    run_recipe(recipe_in(folder, "head-one", *HEAD))
    assert_same(folder / "head-zero3", folder / "head-one")


@pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
def test_a_run_of_one_process_continues_in_two(folder, two_processes, one_process, stage):
    assert two_processes[f"resumed-{stage}"] is None
    assert_same(folder / f"resumed-{stage}", one_process("lora"))


@pytest.mark.parametrize("stage", ["plain", "zero2", "zero3"])
def test_a_run_of_two_processes_continues_in_one(folder, two_processes, one_process, stage):
    assert two_processes[stage] is None
    run, copy = folder / stage, folder / f"{stage}-continued"
    cut_back(run, copy)
    run_recipe(recipe_in(folder, copy.name, *LORA))
    assert_same(copy, one_process("lora"))


def cut_back(run, copy):
    """A copy of a run that was killed after step 2."""
    shutil.copytree(run, copy)
    forget_the_end(copy)


def forget_the_end(run):
    """Leave a run as if it was killed after step 2."""
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000004")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_every_method_is_the_same_under_every_stage(tmp_path, folder, stage):
    shutil.copytree(folder / "base", tmp_path / "base")
    shutil.copy(folder / "train.jsonl", tmp_path)
    recipes = {
        name: method_recipe(tmp_path, name, f"{name}-{stage}", f"offload={stage}").to_dict()
        for name in CASES
    }
    outcomes = train_in_processes(2, recipes, tmp_path, seconds=1800)
    assert not any(outcomes.values())
    for name in CASES:
        run_recipe(method_recipe(tmp_path, name, f"{name}-one"))
        assert_same(tmp_path / f"{name}-{stage}", tmp_path / f"{name}-one")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral"])
def test_other_architectures_can_be_divided(tmp_path, folder, family):
    """A tied head and transposed weights; biases; experts in one tensor."""
    save_tiny(tmp_path / "base", family, tied=family == "gpt2")
    shutil.copy(folder / "train.jsonl", tmp_path)
    two = recipe_in(tmp_path, "two", *LORA, "offload=zero3")
    assert train_in_processes(2, {family: two.to_dict()}, tmp_path) == {family: None}
    run_recipe(recipe_in(tmp_path, "one", *LORA))
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_continues_with_the_same_bits_in_as_many_processes(folder, two_processes, stage):
    assert two_processes[stage] is None
    copy = folder / f"{stage}-again"
    cut_back(folder / stage, copy)
    recipe = recipe_in(folder, copy.name, *LORA, *STAGES[stage])
    assert train_in_processes(2, {"again": recipe.to_dict()}, folder) == {"again": None}
    native = Path("adapter", "native.safetensors")
    assert (copy / native).read_bytes() == (folder / stage / native).read_bytes()


@pytest.mark.slow
def test_four_processes_train_what_one_trains(folder, one_process):
    names = ("lora", "adalora", "xgblora")
    recipes = {
        f"{name}-{stage}-four": method_recipe(
            folder, name, f"{name}-{stage}-four", f"offload={stage}"
        ).to_dict()
        for name in names
        for stage in ("zero2", "zero3")
    }
    outcomes = train_in_processes(4, recipes, folder, seconds=1800)
    assert not any(outcomes.values())
    for name in names:
        reference = method_recipe(folder, name, f"{name}-plain-one")
        run_recipe(reference)
        for stage in ("zero2", "zero3"):
            assert_same(folder / f"{name}-{stage}-four", folder / f"{name}-plain-one")


@pytest.mark.slow
@pytest.mark.real
def test_the_real_model_merges_to_the_same_weights(tmp_path, real_base):
    """Five steps with the base divided and in host memory, in two processes."""
    write_rows(tmp_path / "train.jsonl", 60)
    changes = (
        *("optim.steps=5", "optim.tokens_per_step=256", "data.max_tokens=64"),
        *("optim.micro_batch_tokens=64", "adapter.dtype=fp32", "optim.lr=1e-3"),
        "evaluation.every=5",
    )
    place = ("offload=zero3", "offload.parameters=cpu", "offload.optimizer=cpu")
    one = small_recipe(real_base, tmp_path / "train.jsonl", tmp_path / "one", *changes)
    two = small_recipe(real_base, tmp_path / "train.jsonl", tmp_path / "two", *changes, *place)
    run_recipe(one)
    assert train_in_processes(2, {"two": two.to_dict()}, tmp_path, seconds=1800) == {"two": None}
    torch.testing.assert_close(
        numbers(tmp_path / "two"), numbers(tmp_path / "one"), rtol=1e-4, atol=0
    )
    for name in ("one", "two"):
        merge(tmp_path / name, tmp_path / f"{name}-merged", base="trained", dtype="fp32")
    ours, theirs = (
        load_file(tmp_path / f"{n}-merged" / "model.safetensors") for n in ("two", "one")
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4)
