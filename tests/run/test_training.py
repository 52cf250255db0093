"""A run from recipe to adapter: the files it writes, when it stops at once, what it refuses."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.foundation.errors import AdapterError, BudgetError, RecipeError, TrainingError
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.recipe_files import load_recipe
from qlora_lite.report.page import read as read_report
from qlora_lite.run import job, planning
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.loading import load_run
from qlora_lite.run.training import run_recipe
from qlora_lite.training import metrics
from tests.end_to_end.small_run import recipe_in, write_rows
from tests.tiny import save_tiny


def events_of(folder, name):
    return metrics.read(folder / name / "metrics.jsonl")


def losses_of(folder, name):
    return [event["loss"] for event in events_of(folder, name) if "loss" in event]


@pytest.fixture(scope="module")
def plain(folder):
    changes = ("adapter.dropout=0", "adapter.dtype=fp32", "evaluation.samples=2")
    return run_recipe(recipe_in(folder, "plain", *changes))


def test_a_start_that_failed_leaves_no_folder(folder):
    with pytest.raises(AdapterError):
        run_recipe(recipe_in(folder, "failed", "adapter.targets=nothing_like_that"))
    assert not (folder / "failed").exists()
    (folder / "mine").mkdir()
    with pytest.raises(AdapterError):
        run_recipe(recipe_in(folder, "mine", "adapter.targets=nothing_like_that"))
    assert (folder / "mine").is_dir()


def test_a_warm_up_longer_than_the_run_is_refused(folder):
    with pytest.raises(RecipeError, match="got warmup=13, and the run has 12 steps"):
        recipe_in(folder, "warm", "optim.warmup=13")
    with pytest.raises(RecipeError, match=r"got warmup=1e\+09, and the run has \d+ steps"):
        run_recipe(recipe_in(folder, "warm", "optim.warmup=1e9", "optim.epochs=1"))
    with pytest.raises(RecipeError, match=r"optim\.steps: got 9{20}"):
        recipe_in(folder, "warm", f"optim.steps={'9' * 20}")


def test_the_predicted_memory_includes_the_rows(folder, plain):
    without = planning.plan_recipe(load_recipe(plain.directory)).ledger.measured_bytes
    assert plain.predicted_peak_bytes > without
    report = read_report(plain.directory / "report.html")
    (rows,) = [num_bytes for name, num_bytes, _ in report.memory if name == "rows"]
    assert plain.predicted_peak_bytes == without + rows


def test_it_learns_and_writes_the_files_of_a_run(folder, plain):
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


def test_several_micro_batches_equal_one_batch(folder, plain):
    run_recipe(
        recipe_in(
            folder,
            "one-batch",
            "adapter.dropout=0",
            "adapter.dtype=fp32",
            "optim.micro_batch_tokens=384",
        )
    )
    assert losses_of(folder, "one-batch") == pytest.approx(losses_of(folder, "plain"), rel=1e-5)


def test_checkpointing_does_not_change_the_losses(folder, plain):
    run_recipe(
        recipe_in(
            folder, "stored", "adapter.dropout=0", "adapter.dtype=fp32", "optim.checkpointing=false"
        )
    )
    assert losses_of(folder, "stored") == losses_of(folder, "plain")


@pytest.mark.parametrize("packing", ["true", "false"], ids=["packed", "padded"])
def test_the_loss_is_the_mean_over_the_trained_tokens_of_a_step_each_row_alone(folder, packing):
    name = f"packing-{packing}"
    short = ("optim.steps=1", "data.heldout_share=0")
    run_recipe(recipe_in(folder, name, *short, f"data.packing={packing}"))
    [first] = events_of(folder, name)
    run = load_run(folder / name)
    from qlora_lite.data.load import load_data
    from qlora_lite.run.job import training_batches

    data = load_data(run.recipe.data, run.tokenizer, run.recipe.seed)
    batches = training_batches(run.recipe, data, 128, packs=True).step(0)
    total, count = 0.0, 0
    with torch.no_grad(), run.attached.disabled():
        for ids, targets in rows_of(batches):
            log_probabilities = run.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            for t in (targets >= 0).nonzero().flatten().tolist():
                total -= log_probabilities[t, targets[t]].item()
                count += 1
    assert count == first["trained_tokens"]
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)


def rows_of(batches):
    """(ids, targets) of every row, and of padding, which has no targets."""
    for batch in batches:
        for ids, targets, positions in zip(
            batch.input_ids, batch.targets, batch.position_ids, strict=True
        ):
            ends = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, stop in pairwise(ends):
                yield ids[start:stop], targets[start:stop]


def test_a_missing_adapter_to_start_from_is_an_error_before_the_base_is_read(folder):
    with pytest.raises(AdapterError, match="is not an adapter directory"):
        run_recipe(recipe_in(folder, "from-nothing", f"adapter.start={folder / 'nowhere'}"))


def test_a_run_may_start_from_an_adapter(folder, plain):
    start = f"adapter.start={plain.directory / 'adapter'}"
    short = ("adapter.dropout=0", "adapter.dtype=fp32", "optim.steps=1")
    result = run_recipe(recipe_in(folder, "continued", *short, start))
    assert result.scores["loss_before"] == pytest.approx(plain.scores["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        ("adapter=loftq", "adapter.iterations=2", "adapter.svd_iterations=1"),
        ("adapter=pissa", "adapter.mode=requantise", "adapter.svd_iterations=1"),
    ],
    ids=["loftq", "pissa"],
)
def test_a_run_from_an_adapter_with_its_own_base_weights_reuses_them_under_another_seed(
    folder, method
):
    heldout = write_rows(folder / "heldout.jsonl", 30)
    changes = (
        *method,
        "adapter.rank=4",
        "adapter.dtype=fp32",
        "base.quant=nf4",
        "data.heldout_share=0",
        f"data.heldout={heldout}",
        "optim.steps=1",
    )
    name = method[0].replace("=", "-")
    first = run_recipe(recipe_in(folder, name, *changes, "seed=1"))
    start = f"adapter.start={first.directory / 'adapter'}"
    second = run_recipe(recipe_in(folder, f"{name}-continued", *changes, start, "seed=2"))
    assert second.scores["loss_before"] == pytest.approx(first.scores["loss"], rel=1e-6)
    saved, again = (
        load_file(r.directory / "adapter" / "native.safetensors") for r in (first, second)
    )
    splits = [key for key in saved if ".start/" in key]
    assert splits
    assert all(torch.equal(again[key], saved[key]) for key in splits)


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
    with pytest.raises(TrainingError, match=r"the first loss is nan(.|\n)*\[\[it is"):
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


def test_a_budget_that_is_too_small_is_an_error_before_the_base_is_loaded(folder):
    class NoLoading(Watcher):
        def loading(self, done_bytes, total_bytes):
            raise AssertionError("the base was read")

    with pytest.raises(BudgetError, match=r"needed, 1\.00 MiB allowed"):
        run_recipe(recipe_in(folder, "tight", "budget=1MiB"), watcher=NoLoading())
    assert not (folder / "tight" / "recipe.json").exists()


def test_without_a_budget_a_plan_that_does_not_fit_is_only_noted(folder, monkeypatch):
    monkeypatch.setattr(planning, "available_bytes", lambda device: 2**20)
    notes = []

    class Notes(Watcher):
        def note(self, text):
            notes.append(text)

    run_recipe(recipe_in(folder, "no-budget", "optim.steps=1"), watcher=Notes())
    assert any("may fail for lack of memory" in note for note in notes)


def test_a_run_can_be_repeated_from_its_record(folder, plain):
    from qlora_lite.recipe_files import load_recipe

    again = load_recipe(plain.directory).but(f"output={folder / 'again'}")
    run_recipe(again)
    assert losses_of(folder, "again") == losses_of(folder, "plain")


def test_an_extended_run_scores_the_rows_that_it_scored_before(folder, monkeypatch):
    scored = []

    def count(model, batches, sum_over_processes):
        scored.append(sum(batch.num_targets for batch in batches))
        return SimpleNamespace(loss=1.0, accuracy=0.5, perplexity=2.0)

    monkeypatch.setattr(job, "score", count)
    changes = ("data.heldout_share=0.4", "evaluation.every=null")
    run_recipe(recipe_in(folder, "longer", *changes, "optim.steps=3"))
    first = RunFolder(folder / "longer").scored_rows
    run_recipe(recipe_in(folder, "longer", *changes, "optim.steps=40"), extend=True)
    assert RunFolder(folder / "longer").scored_rows == first
    assert first < 40  # of about 48 held-out rows: 3 steps allow fewer, and 40 would allow all
    assert len(set(scored)) == 1
