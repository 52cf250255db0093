"""A run from recipe to adapter: what it leaves, when it stops at once, and what it refuses."""

import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from qlora_lite.foundation.errors import AdapterError, BudgetError, RecipeError, TrainingError
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model.facts import read_facts
from qlora_lite.model.load import build_empty
from qlora_lite.model.settings import Base
from qlora_lite.report.page import read as read_report
from qlora_lite.run import planning
from qlora_lite.run.loading import load_run
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics
from tests.end_to_end.small_run import recipe_in
from tests.tiny import save_tiny


def events_of(folder, name):
    return metrics.read(folder / name / "metrics.jsonl")


def losses_of(folder, name):
    return [event["loss"] for event in events_of(folder, name) if "loss" in event]


@pytest.fixture(scope="module")
def plain(folder):
    changes = ("adapter.dropout=0", "adapter.dtype=fp32", "evaluation.samples=2")
    return run_recipe(recipe_in(folder, "plain", *changes))


def test_it_learns_and_leaves_what_the_contract_says(folder, plain):
    assert plain.scores["loss"] < plain.scores["loss_before"]
    assert sorted(path.name for path in plain.directory.iterdir()) == [
        ".lock",
        "adapter",
        "checkpoints",
        "metrics.jsonl",
        "recipe.json",
        "report.html",
    ]
    first = events_of(folder, "plain")[1]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"} < set(first)
    record = json.loads((plain.directory / "recipe.json").read_text())
    assert set(record) >= {"recipe", "versions", "threads", "fingerprints", "git_revision"}
    page = read_report(plain.directory / "report.html")
    assert page.samples == plain.samples
    assert len(page.samples) == 2
    assert page.memory[0] == ("peak", plain.predicted_peak_bytes, plain.peak_bytes)


def test_four_micro_batches_are_one_batch(folder, plain):
    run_recipe(
        recipe_in(
            folder,
            "whole",
            "adapter.dropout=0",
            "adapter.dtype=fp32",
            "optim.micro_batch_tokens=384",
        )
    )
    assert losses_of(folder, "whole") == pytest.approx(losses_of(folder, "plain"), rel=1e-5)


def test_checkpointing_changes_nothing(folder, plain):
    run_recipe(
        recipe_in(
            folder, "kept", "adapter.dropout=0", "adapter.dtype=fp32", "optim.checkpointing=false"
        )
    )
    assert losses_of(folder, "kept") == losses_of(folder, "plain")


def test_padded_batches_learn_as_packed_ones_do(folder, plain):
    run_recipe(
        recipe_in(folder, "padded", "adapter.dropout=0", "adapter.dtype=fp32", "data.packing=false")
    )
    assert losses_of(folder, "padded")[-1] == pytest.approx(losses_of(folder, "plain")[-1], rel=0.2)


def test_the_loss_is_the_mean_over_the_trained_tokens_of_a_step(folder, plain):
    first = events_of(folder, "plain")[1]
    run = load_run(plain.directory)
    from qlora_lite.data.load import load_data
    from qlora_lite.run.job import training_batches

    data = load_data(run.recipe.data, run.tokenizer, run.recipe.seed)
    batches = training_batches(run.recipe, data, 128).step(0)
    total, count = 0.0, 0
    with torch.no_grad(), run.attached.disabled():
        for batch in batches:
            logits = run.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits
            log_probabilities = logits.log_softmax(-1)
            for b, t in (batch.targets >= 0).nonzero().tolist():
                total -= log_probabilities[b, t, batch.targets[b, t]].item()
                count += 1
    assert count == first["trained_tokens"]
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)


def test_early_stopping_keeps_the_best_adapter_and_says_so(folder):
    changes = ("optim.lr=2.0", "optim.schedule=constant", "evaluation.every=1")
    result = run_recipe(recipe_in(folder, "early", *changes, "evaluation.patience=2"))
    scorings = {e["step"]: e["heldout_loss"] for e in events_of(folder, "early") if len(e) < 7}
    best = min(scorings, key=lambda step: scorings[step])
    assert max(scorings) == best + 2 < 12
    assert result.steps == best
    assert result.scores["loss"] == scorings[best]
    sidecar = json.loads((folder / "early" / "adapter" / "qlora_lite.json").read_text())
    assert (sidecar["state"], sidecar["steps"]) == ("best", best)
    kept = load_file(folder / "early" / "adapter" / "native.safetensors")
    of_best = load_file(folder / "early" / "checkpoints" / "best" / "adapter.safetensors")
    last = sorted((folder / "early" / "checkpoints").glob("step-*"))[-1]
    of_last = load_file(last / "adapter.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in of_best.items())
    assert any(not torch.equal(kept[name], tensor) for name, tensor in of_last.items())


def test_with_patience_the_best_adapter_is_kept_although_nothing_stopped_the_run(folder):
    changes = ("optim.lr=0.05", "optim.schedule=constant", "evaluation.every=1")
    result = run_recipe(recipe_in(folder, "patient", *changes, "evaluation.patience=50"))
    scorings = {e["step"]: e["heldout_loss"] for e in events_of(folder, "patient") if len(e) < 7}
    assert max(scorings) == 12
    assert result.scores["loss"] == min(scorings.values())


def test_early_stopping_waits_for_the_budget_that_was_asked_for(folder):
    changes = ("optim.lr=0.5", "optim.schedule=constant", "evaluation.every=1")
    method = ("adapter=adalora", "adapter.target_rank=2", "adapter.warmup=2", "adapter.final=4")
    result = run_recipe(recipe_in(folder, "budget", *changes, *method, "evaluation.patience=1"))
    scorings = {e["step"]: e["heldout_loss"] for e in events_of(folder, "budget") if len(e) < 7}
    earlier = [scorings[step] for step in range(8)]
    assert any(after > before for before, after in pairwise(earlier))
    assert result.steps >= 8
    native = load_file(folder / "budget" / "adapter" / "native.safetensors")
    masks = [tensor != 0 for name, tensor in native.items() if name.endswith(".e")]
    assert sum(int(mask.sum()) for mask in masks) == 2 * len(masks)


def test_learned_positions_limit_the_length_of_a_row(folder):
    save_tiny(folder / "gpt2", "gpt2", tied=True)
    with pytest.raises(RecipeError, match=r"512 positions.*learned.*max_tokens=512"):
        run_recipe(recipe_in(folder, "too-long", "data.max_tokens=513", base="gpt2"))


def test_an_adapter_to_start_from_is_looked_for_before_anything_is_read(folder):
    with pytest.raises(AdapterError, match="is not an adapter directory"):
        run_recipe(recipe_in(folder, "from-nothing", f"adapter.start={folder / 'nowhere'}"))


def test_a_run_may_begin_from_an_adapter(folder, plain):
    start = f"adapter.start={plain.directory / 'adapter'}"
    result = run_recipe(
        recipe_in(folder, "continued", "adapter.dropout=0", "adapter.dtype=fp32", start)
    )
    assert result.scores["loss_before"] == pytest.approx(plain.scores["loss"], rel=1e-6)


def _broken_base(folder, name, change):
    """A copy of the base with a tensor changed."""
    directory = save_tiny(folder / name, "llama")
    file = directory / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_loss_that_is_not_finite_stops_at_once_and_shows_rows(folder):
    def change(tensors):
        tensors["model.norm.weight"][3] = math.nan

    _broken_base(folder, "nan", change)
    recipe = recipe_in(folder, "run-nan", base="nan").but("data.heldout_share=0")
    with pytest.raises(TrainingError, match=r"the loss is nan(.|\n)*\[\[it is"):
        run_recipe(recipe)


def test_a_first_loss_far_above_guessing_stops_at_once(folder):
    def change(tensors):
        tensors["lm_head.weight"] *= 30

    _broken_base(folder, "absurd", change)
    with pytest.raises(TrainingError, match=r"worse than guessing(.|\n)*line \d+"):
        run_recipe(recipe_in(folder, "run-absurd", base="absurd"))


def test_a_gradient_that_is_exactly_zero_stops_at_once(folder):
    def change(tensors):
        tensors["lm_head.weight"].zero_()

    _broken_base(folder, "zero", change)
    with pytest.raises(TrainingError, match="gradient norm is 0"):
        run_recipe(recipe_in(folder, "run-zero", base="zero"))


def test_a_budget_that_is_too_small_is_refused_before_anything_is_loaded(folder):
    class Loud(Watcher):
        def loading(self, done_bytes, total_bytes):
            raise AssertionError("the base was read")

    with pytest.raises(BudgetError, match=r"needed, 1\.00 MiB allowed"):
        run_recipe(recipe_in(folder, "tight", "budget=1MiB"), watcher=Loud())
    assert not (folder / "tight" / "recipe.json").exists()


def test_without_a_budget_a_plan_that_does_not_fit_is_told_and_tried(folder, monkeypatch):
    monkeypatch.setattr(planning, "available_bytes", lambda device: 2**20)
    told = []

    class Told(Watcher):
        def note(self, text):
            told.append(text)

    run_recipe(recipe_in(folder, "untold", "optim.steps=1"), watcher=Told())
    assert any("may fail for lack of memory" in note for note in told)
    told.clear()
    run_recipe(
        recipe_in(folder, "beyond", "optim.steps=1", 'adapter.ranks={"0-9": 2}'), watcher=Told()
    )
    assert any("'0-9' reaches beyond the last block" in note and "is 1" in note for note in told)


def test_a_teacher_is_one_more_forward_of_the_bare_base_in_the_plan(folder):
    alone = planning.plan_recipe(recipe_in(folder, "no-teacher", "adapter.rank=4"))
    taught = planning.plan_recipe(recipe_in(folder, "teacher", "adapter=ba_lora", "adapter.rank=4"))
    tokens = 128
    base = Base(model=str(folder / "base"))
    model = build_empty(read_facts(base).config, base)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.int64, device="meta"))
    # the counter takes the whole square of attention, of which a causal one needs half
    config = model.config
    square = 4 * tokens * config.hidden_size * config.num_hidden_layers
    forward = counter.get_total_flops() / tokens - square / 2
    assert taught.flops_per_token - alone.flops_per_token == pytest.approx(forward, rel=0.01)


def test_a_base_without_an_error_is_no_start_for_loftq(folder):
    for quant in ("bf16", "fp32"):
        recipe = recipe_in(folder, "loftq", "adapter=loftq", f"base.quant={quant}")
        with pytest.raises(RecipeError, match=r"quantisation error.*base\.quant=nf4"):
            planning.plan_recipe(recipe)
    assert planning.plan_recipe(recipe_in(folder, "loftq", "adapter=loftq", "base.quant=int8"))


def test_a_tracker_gets_every_step(folder):
    run_recipe(recipe_in(folder, "tracked", 'tracking=["tensorboard"]', "optim.steps=3"))
    assert list((folder / "tracked").rglob("events.out.tfevents*"))


def test_a_tracker_that_is_not_installed_is_named(folder):
    with pytest.raises(RecipeError, match="pip install wandb"):
        run_recipe(recipe_in(folder, "untracked", 'tracking=["wandb"]'))


def test_a_run_can_be_repeated_from_its_record(folder, plain):
    from qlora_lite.recipe_files import load_recipe

    again = load_recipe(plain.directory).but(f"output={folder / 'again'}")
    run_recipe(again)
    assert losses_of(folder, "again") == losses_of(folder, "plain")
