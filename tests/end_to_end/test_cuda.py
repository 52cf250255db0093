"""Training, resuming and merging on a CUDA card."""

import signal

import pytest
import torch

from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics
from tests.end_to_end.small_run import finish_in_child, run_in_child, small_recipe, write_rows
from tests.tiny import save_tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    # wide enough for bitsandbytes' 8-bit moments (from 4,096 numbers) and paging (from 100,000)
    save_tiny(
        folder / "base",
        "llama",
        dtype=torch.bfloat16,
        hidden_size=512,
        intermediate_size=1024,
        num_attention_heads=8,
    )
    write_rows(folder / "train.jsonl")
    return folder


ON_CPU = ("device=cpu", "base.compute=fp32")
ON_CUDA = ("device=cuda", "base.compute=auto", "optim.lr=2e-3", "adapter.rank=256")


def run(folder, name, *changes):
    recipe = small_recipe(folder / "base", folder / "train.jsonl", folder / name)
    result = run_recipe(recipe.but(*ON_CUDA, *changes))
    return result, [e["loss"] for e in metrics.read(folder / name / "metrics.jsonl") if "loss" in e]


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8", "bf16", "fp32"])
@pytest.mark.parametrize("states", ["32bit", "8bit", "paged_8bit"])
def test_it_learns_in_every_precision_with_every_optimizer(folder, quant, states):
    result, losses = run(
        folder, f"{quant}-{states}", f"base.quant={quant}", f"optim.states={states}"
    )
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert result.scores["loss"] < result.scores["loss_before"]


@pytest.mark.parametrize("states", ["32bit", "8bit", "paged_8bit"])
def test_a_killed_and_continued_run_differs_only_by_rounding(folder, states):
    changes = (*ON_CUDA, f"optim.states={states}")
    losses = []
    for name in ("uninterrupted", "killed"):
        recipe = small_recipe(
            folder / "base", folder / "train.jsonl", folder / f"{name}-{states}", *changes
        )
        if name == "killed":
            child = run_in_child(recipe, "step")
            child.join()
            assert child.exitcode == -signal.SIGKILL
        finish_in_child(recipe)
        log = metrics.read(folder / f"{name}-{states}" / "metrics.jsonl")
        losses.append([e["loss"] for e in log if "loss" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_fp16_compute_scales_its_loss(folder):
    _, losses = run(folder, "fp16", "base.compute=fp16")
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_the_first_loss_is_that_of_a_cpu(folder):
    _, on_cuda = run(folder, "cuda-start", "optim.steps=1", "adapter.dropout=0")
    _, on_cpu = run(folder, "cpu-start", "optim.steps=1", "adapter.dropout=0", *ON_CPU)
    assert on_cuda[0] == pytest.approx(on_cpu[0], rel=2e-2)  # bf16 against fp32 compute


def test_the_merged_model_predicts_what_the_trained_one_does(folder):
    run(folder, "merged-run")
    result = merge(folder / "merged-run", folder / "merged", base="trained", verify=True)
    assert result.written.top1 > 0.95
