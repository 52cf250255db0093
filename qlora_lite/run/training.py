"""From recipe to adapter: the few sentences that carry out a run.

claim the folder -> read data -> plan -> load the base, attach the adapter -> train -> save, report
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from qlora_lite.adapters.state import begin_from, save_adapter
from qlora_lite.data.batches import Batch, Batches, in_order
from qlora_lite.data.coloured import bracketed
from qlora_lite.data.load import Prepared, load_data
from qlora_lite.data.preview import preview_row
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.evaluation.generation import answer
from qlora_lite.evaluation.perplexity import score
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import BudgetError
from qlora_lite.foundation.files import complete_directory, lock
from qlora_lite.foundation.watch import Watcher
from qlora_lite.memory.measure import peak_bytes
from qlora_lite.memory.plan import Plan, describe, require_fit
from qlora_lite.model.checkpointing import enable_checkpointing
from qlora_lite.model.freeze import StoredWeight
from qlora_lite.model.load import load_tokenizer
from qlora_lite.recipe import Recipe
from qlora_lite.report import Report, Sample
from qlora_lite.report import write as write_report
from qlora_lite.run.folder import RunFolder, git_revision
from qlora_lite.run.loading import Loaded, load_for_training
from qlora_lite.run.planning import plan_recipe
from qlora_lite.training import metrics
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.loop import Job, Progress, restore_best, train
from qlora_lite.training.optimizer import AdamW

NUM_SAMPLES = 3
SAMPLE_TOKENS = 48
ROWS_SHOWN = 3
"""Of a batch, when a run has to stop."""


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    directory: Path
    already_finished: bool
    steps: int
    scores: dict[str, float]
    """Of the held-out rows: `loss_before` (bare base) and `loss`; empty if nothing is held out."""
    samples: tuple[Sample, ...]
    plan: Plan | None
    peak_bytes: int | None


def run_recipe(
    recipe: Recipe, *, extend: bool = False, watcher: Watcher | None = None
) -> RunResult:
    """Train a recipe, or go on where an earlier process stopped.

    Args:
        extend: train a run longer than it was meant to be; only its length may differ.

    Raises:
        QloraLiteError: for everything that the user can mend.
        Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    watcher = watcher or Watcher()
    recipe = with_absolute_paths(recipe)
    folder = RunFolder(Path(recipe.output))
    folder.claim(recipe, extend)
    folder.path.mkdir(parents=True, exist_ok=True)
    with lock(folder.path):
        folder.claim(recipe, extend)
        if folder.is_finished(recipe):
            return _finished(folder)
        return _train(recipe, folder, extend, watcher)


def _train(recipe: Recipe, folder: RunFolder, extend: bool, watcher: Watcher) -> RunResult:
    rule = devices.choose(recipe.device, recipe.base.compute)
    watcher.note(rule.line)
    tokenizer = load_tokenizer(recipe.base)
    data = load_data(recipe.data, tokenizer, recipe.seed)
    watcher.prepared(data)
    plan = plan_recipe(recipe, rule)
    watcher.planned(plan)
    _refuse_what_does_not_fit(recipe, plan)

    loaded = load_for_training(recipe, watcher=watcher)
    fingerprints = {"data": data.fingerprint, "base": loaded.base.checkpoint.fingerprint}
    for warning in folder.record(recipe, fingerprints, rule.line):
        watcher.note(warning)
    assert loaded.attached is not None
    if recipe.adapter.start:
        begin_from(loaded.attached, Path(recipe.adapter.start))
    if recipe.optim.checkpointing:
        enable_checkpointing(loaded.base.model)
    loaded.attached.train()

    batches = training_batches(recipe, data, plan.micro_batch_tokens)
    with _trackers(recipe, folder) as track:
        job = _job(recipe, folder, loaded, data, batches, rule, extend, track, watcher)
        began = time.perf_counter()
        try:
            progress = train(job)
        except torch.OutOfMemoryError as error:
            raise BudgetError(f"the device is out of memory. {describe(plan)}") from error
        finally:
            watcher.ended()
    if progress.stopped_early:
        restore_best(job)
    return _finish(recipe, folder, loaded, data, plan, progress, time.perf_counter() - began)


def _job(
    recipe: Recipe,
    folder: RunFolder,
    loaded: Loaded,
    data: Prepared,
    batches: Batches,
    rule: DeviceRule,
    extend: bool,
    track: Callable[[dict[str, Any], int], None],
    watcher: Watcher,
) -> Job:
    assert loaded.attached is not None
    optim, attached, model = recipe.optim, loaded.attached, loaded.causal
    optimizer = AdamW(
        attached.groups(),
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        states=rule.optimizer_states if optim.states == "auto" else optim.states,
        rounding=optim.rounding,
    )

    def score_heldout() -> dict[str, float]:
        attached.train(False)
        result = score(model, held_out_batches(recipe, data))
        attached.train()
        return {"loss": result.loss, "accuracy": result.accuracy, "perplexity": result.perplexity}

    def show(batch: Batch) -> str:
        rows = set(batch.rows[:ROWS_SHOWN])
        found = [example for example in data.train if example.row in rows]
        shown = [preview_row(e, data.train_source, loaded.tokenizer) for e in found]
        return "\n".join(f"{row.where}: {bracketed(row.pieces)}" for row in shown)

    return Job(
        model=model,
        attached=attached,
        engine=TorchEngine(optimizer, rule.compute),
        batches=batches,
        optim=optim,
        seed=recipe.seed,
        directory=folder.path,
        vocabulary=loaded.base.config.get_text_config().vocab_size,
        evaluation=recipe.evaluation,
        checkpoints=recipe.checkpoints,
        score=score_heldout if len(data.heldout) else None,
        show_rows=show,
        extend=extend,
        track=track,
        watcher=watcher,
    )


def training_batches(recipe: Recipe, data: Prepared, micro_batch_tokens: int) -> Batches:
    """The steps of a recipe over its data."""
    return Batches(
        data.train,
        max_tokens=recipe.data.max_tokens,
        tokens_per_step=recipe.optim.tokens_per_step,
        micro_batch_tokens=micro_batch_tokens,
        seed=recipe.seed,
        packing=recipe.data.packing,
        shuffle=recipe.data.shuffle,
        epochs=recipe.optim.epochs,
        steps=recipe.optim.steps,
    )


def held_out_batches(recipe: Recipe, data: Prepared) -> Iterator[Batch]:
    """Every held-out row once."""
    return in_order(
        data.heldout,
        max_tokens=recipe.data.max_tokens,
        micro_batch_tokens=recipe.optim.micro_batch_tokens or recipe.data.max_tokens,
        packing=recipe.data.packing,
    )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe wherever it is read from: existing paths become absolute."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).resolve()) if name and Path(name).exists() else name

    data = {name: absolute(getattr(recipe.data, name)) for name in ("train", "heldout")}
    return recipe.model_copy(
        update={
            "base": recipe.base.model_copy(update={"model": absolute(recipe.base.model)}),
            "data": recipe.data.model_copy(update=data),
            "adapter": recipe.adapter.model_copy(update={"start": absolute(recipe.adapter.start)}),
        }
    )


def _refuse_what_does_not_fit(recipe: Recipe, plan: Plan) -> None:
    """A budget that was given is kept; without one the plan only warns."""
    if recipe.budget:
        require_fit(plan)


@contextmanager
def _trackers(recipe: Recipe, folder: RunFolder) -> Iterator[Callable[[dict[str, Any], int], None]]:
    """Trackers that were asked for, through accelerate; by default there is none."""
    if not recipe.tracking:
        yield lambda values, step: None
        return
    accelerator = Accelerator(
        cpu=recipe.device == "cpu", log_with=list(recipe.tracking), project_dir=folder.path
    )
    accelerator.init_trackers(folder.path.name)
    yield lambda values, step: accelerator.log(values, step=step)
    accelerator.end_training()


# -- the end of a run ------------------------------------------------------------------------------


def _finish(
    recipe: Recipe,
    folder: RunFolder,
    loaded: Loaded,
    data: Prepared,
    plan: Plan,
    progress: Progress,
    seconds: float,
) -> RunResult:
    assert loaded.attached is not None
    attached = loaded.attached
    attached.train(False)
    peak = peak_bytes(loaded.causal.device)
    samples = _samples(loaded, data)
    events = metrics.read(folder.metrics)
    scores = held_out_scores(events, progress)
    sidecar = {
        "adapter": recipe.adapter.model_dump(mode="json"),
        "recipe": recipe.as_values(),
        "base": {
            "model": recipe.base.model,
            "revision": recipe.base.revision,
            "quant": loaded.base.quant.model_dump(mode="json"),
            "compute": devices.NAMES[loaded.base.rule.compute],
            "fingerprint": loaded.base.checkpoint.fingerprint,
        },
        "data_fingerprint": data.fingerprint,
        "steps": progress.best_step if progress.stopped_early else progress.step,
        "state": "best" if progress.stopped_early else "last",
        "method": attached.method.state_dict(),
        "tokens": progress.tokens,
        "scores": scores,
        "peak_bytes": peak,
        "versions": folder.read_record()["versions"],
    }
    with complete_directory(folder.adapter) as aside:
        save_adapter(
            aside,
            attached,
            base=recipe.base.model,
            revision=recipe.base.revision,
            fan_in_fan_out=_keeps_weights_transposed(loaded),
            sidecar=sidecar,
        )
    facts = {
        "device": loaded.base.rule.line,
        "steps": str(progress.step),
        "tokens": f"{progress.tokens:,}",
        "training time": f"{progress.seconds:.1f} s",
        "this process": f"{seconds:.1f} s",
        "trained parameters": f"{attached.num_parameters:,}",
        "rows": f"{len(data.train):,} trained, {len(data.heldout):,} held out",
        "git revision": git_revision() or "none",
        **{f"version of {name}": v for name, v in sidecar["versions"].items()},
    }
    report = Report(
        title=folder.path.name,
        recipe=recipe.as_values(),
        metrics=events,
        facts=facts,
        memory=[("peak", plan.peak_bytes, peak)]
        + [(term.name, term.num_bytes, None) for term in plan.ledger.terms],
        samples=samples,
    )
    write_report(folder.report, report)
    return RunResult(folder.path, False, progress.step, scores, tuple(samples), plan, peak)


def _finished(folder: RunFolder) -> RunResult:
    sidecar = folder.read_sidecar()
    scores = sidecar["scores"]
    return RunResult(folder.path, True, sidecar["steps"], scores, (), None, sidecar["peak_bytes"])


def held_out_scores(events: list[dict[str, Any]], progress: Progress) -> dict[str, float]:
    """The bare base's loss and the kept adapter's, from the log."""
    losses = {e["step"]: e["heldout_loss"] for e in events if "heldout_loss" in e}
    if not losses:
        return {}
    kept = progress.best_step if progress.stopped_early else progress.step
    return {"loss_before": losses[0], "loss": losses[kept]}


def _keeps_weights_transposed(loaded: Loaded) -> bool:
    """Whether the base stores (d_in, d_out), as GPT-2's Conv1D does: PEFT has to know."""
    assert loaded.attached is not None
    sources = [layer.base.source for layer in loaded.attached.layers.values()]
    return any(isinstance(source, StoredWeight) and source.transposed for source in sources)


def _samples(loaded: Loaded, data: Prepared) -> list[Sample]:
    """Answers of the bare base and of the adapted model to a few held-out prompts."""
    assert loaded.attached is not None
    model, tokenizer = loaded.base.model, loaded.tokenizer
    ends = end_ids(tokenizer)
    samples = []
    for example in list(data.heldout)[:NUM_SAMPLES]:
        mask = example.loss_mask.tolist()
        first = mask.index(True) if not mask[0] else max(1, len(mask) // 2)
        ids = example.ids.tolist()
        stop = next((i for i in range(first, len(mask)) if not mask[i]), len(mask))
        with loaded.attached.disabled():
            before = answer(model, tokenizer, ids[:first], ends, SAMPLE_TOKENS)
        after = answer(model, tokenizer, ids[:first], ends, SAMPLE_TOKENS)
        prompt = str(tokenizer.decode(ids[:first], skip_special_tokens=True)).strip()
        expected = str(tokenizer.decode(ids[first:stop], skip_special_tokens=True)).strip()
        samples.append(Sample(prompt, before, after, expected))
    return samples


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens at which generation stops: the end of a turn, and the tokenizer's eos."""
    found = [ChatTemplate(tokenizer).end_of_turn_id, tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))
