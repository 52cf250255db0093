"""From recipe to adapter: the few sentences that carry out a run.

claim the folder -> plan -> read data -> load the base, attach the adapter -> train -> finish
"""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from qlora_lite.adapters.warm_start import describe_warm_start, saved_state, warm_start
from qlora_lite.data.batches import Batch, Batches, in_order
from qlora_lite.data.coloured import bracketed
from qlora_lite.data.load import PreparedData, load_data
from qlora_lite.data.preview import preview_row
from qlora_lite.evaluation.perplexity import score
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import BaseModelError, BudgetError, RecipeError
from qlora_lite.foundation.files import lock
from qlora_lite.foundation.units import format_bytes
from qlora_lite.foundation.watch import Watcher
from qlora_lite.memory.allocator import give_back_freed_memory
from qlora_lite.memory.measure import reset_peak
from qlora_lite.memory.plan import Plan, require_fit
from qlora_lite.model.checkpointing import enable_checkpointing
from qlora_lite.model.config import read_config
from qlora_lite.model.load import load_tokenizer
from qlora_lite.recipe import Recipe
from qlora_lite.report.page import Sample
from qlora_lite.run.finishing import FinishedTraining, finish
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.loading import LoadedModel, load_for_training
from qlora_lite.run.planning import NO_BUDGET, check_settings, plan_recipe
from qlora_lite.training import checkpoint
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.interruption import StopRequest, stop_on_signals
from qlora_lite.training.loop import TrainingJob, restore_best, train
from qlora_lite.training.optimizer import AdamW

ROWS_SHOWN = 3
"""Of a batch, when a run has to stop."""


@dataclass(frozen=True)
class RunResult:
    """What a run came to."""

    directory: Path
    already_finished: bool
    steps: int
    scores: dict[str, float]
    """Of the held-out rows: `loss_before` (at the start) and `loss`; empty if none is held out."""
    samples: tuple[Sample, ...]
    predicted_peak_bytes: int
    peak_bytes: int


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
    _require_trackers(recipe.tracking)
    folder.make()
    with lock(folder.path), stop_on_signals() as request:
        folder.claim(recipe, extend)
        folder.forget_failed_start(recipe)
        if folder.is_finished(recipe):
            return _finished(folder)
        return _train(recipe, folder, watcher, request)


def _train(recipe: Recipe, folder: RunFolder, watcher: Watcher, request: StopRequest) -> RunResult:
    rule = devices.choose(recipe.device, recipe.base.compute)
    watcher.note(rule.line)
    give_back_freed_memory()
    plan = plan_recipe(with_micro_batch(recipe, folder.micro_batch_tokens), rule)
    watcher.planned(plan)
    _hold_to_budget(recipe, plan, watcher)
    for note in check_settings(recipe):
        watcher.note(note)
    data = load_data(recipe.data, load_tokenizer(recipe.base), recipe.seed)
    require_known_tokens(data, recipe)
    watcher.prepared(data)
    micro_batch_tokens = recipe.optim.micro_batch_tokens or plan.micro_batch_tokens
    batches = training_batches(recipe, data, micro_batch_tokens)
    folder.require_longer(batches.steps)
    request.raise_if_requested("before anything was trained")

    try:
        resume_from = [checkpoint.load_newest(folder.checkpoints, watcher.note)]
        loaded = load_for_training(recipe, watcher=watcher, saved=_saved(recipe, resume_from[0]))
        request.raise_if_requested("before anything was trained")
        job = _job(recipe, folder, loaded, data, batches, rule, watcher, request)
        job.resume_from = resume_from.pop()  # the job lets go of it, and nobody else holds it
        fingerprints = {"data": data.fingerprint, "base": loaded.base.checkpoint.fingerprint}
        for warning in folder.record(recipe, fingerprints, rule.line, micro_batch_tokens):
            watcher.note(warning)
        reset_peak(rule.device)
        with _tracked(job, recipe):
            progress = train(job)
    except torch.OutOfMemoryError as error:
        raise BudgetError(_out_of_memory(recipe, rule, plan)) from error
    finally:
        watcher.ended()
    if job.keeps_best:
        restore_best(job)
    assert loaded.attached is not None
    end = FinishedTraining(
        recipe, folder, loaded, loaded.attached, data, plan, progress, job.keeps_best
    )
    outcome = finish(end)
    return RunResult(
        folder.path,
        already_finished=False,
        steps=end.kept_step,
        scores=outcome.scores,
        samples=outcome.samples,
        predicted_peak_bytes=plan.ledger.measured_bytes,
        peak_bytes=outcome.peak_bytes,
    )


def _saved(
    recipe: Recipe, resume_from: checkpoint.TrainingState | None
) -> dict[str, torch.Tensor] | None:
    """The adapter's state so far, or that of the one that it begins from, if of the same method."""
    if resume_from is not None:
        return resume_from.adapter
    start = recipe.adapter.start
    return None if start is None else saved_state(Path(start), recipe.adapter)


def _finished(folder: RunFolder) -> RunResult:
    sidecar = folder.read_sidecar()
    return RunResult(
        folder.path,
        already_finished=True,
        steps=sidecar["steps"],
        scores=sidecar["scores"],
        samples=(),
        predicted_peak_bytes=sidecar["predicted_peak_bytes"],
        peak_bytes=sidecar["peak_bytes"],
    )


def _job(
    recipe: Recipe,
    folder: RunFolder,
    loaded: LoadedModel,
    data: PreparedData,
    batches: Batches,
    rule: DeviceRule,
    watcher: Watcher,
    request: StopRequest,
) -> TrainingJob:
    """The model with its adapter, ready for the first step."""
    assert loaded.attached is not None
    if recipe.adapter.start and not checkpoint.all_checkpoints(folder.checkpoints):
        start = Path(recipe.adapter.start)
        for note in describe_warm_start(start, recipe.adapter, recipe.base.model):
            watcher.note(note)
        warm_start(loaded.attached, start)
    if recipe.optim.checkpointing:
        enable_checkpointing(loaded.base.model)
    loaded.attached.train()
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

    return TrainingJob(
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
        request=request,
        watcher=watcher,
    )


def training_batches(recipe: Recipe, data: PreparedData, micro_batch_tokens: int) -> Batches:
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


def held_out_batches(recipe: Recipe, data: PreparedData) -> Iterator[Batch]:
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


def with_micro_batch(recipe: Recipe, tokens: int | None) -> Recipe:
    """The recipe with what an earlier process of this run chose, unless the recipe says itself."""
    if tokens is None or recipe.optim.micro_batch_tokens is not None:
        return recipe
    optim = recipe.optim.model_copy(update={"micro_batch_tokens": tokens})
    return recipe.model_copy(update={"optim": optim})


def require_known_tokens(data: PreparedData, recipe: Recipe) -> None:
    """Every token of the rows must be one that the base has.

    Raises:
        BaseModelError: if the tokenizer has more than the base was made for.
    """
    config = read_config(recipe.base.model, recipe.base.revision, recipe.base.trust_remote_code)
    vocabulary = config.get_text_config().vocab_size
    for examples in (data.train, data.heldout):
        if len(examples) and (largest := int(examples.ids.max())) >= vocabulary:
            token = data.template.tokenizer.convert_ids_to_tokens(largest)
            raise BaseModelError(
                f"the rows hold token {largest} ({token!r}), and {recipe.base.model} has tokens 0 "
                f"to {vocabulary - 1}: its tokenizer belongs to another model. Restore the "
                "tokenizer that came with the weights"
            )


def _hold_to_budget(recipe: Recipe, plan: Plan, watcher: Watcher) -> None:
    """A budget that was given is kept; what the device has free may change, and is only told."""
    if recipe.budget:
        require_fit(plan)
    elif not plan.fits:
        watcher.note(f"{plan.verdict}; {NO_BUDGET}, and the run may end for lack of memory")


def _require_trackers(names: Sequence[str]) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"tracking={list(names)}: the package {missing[0]} is not installed. Run "
            f"`pip install {missing[0]}`, or leave that tracker out"
        )


@contextmanager
def _tracked(job: TrainingJob, recipe: Recipe) -> Iterator[None]:
    """Trackers that were asked for, through accelerate; by default there is none."""
    if not recipe.tracking:
        yield
        return
    accelerator = Accelerator(
        cpu=recipe.device == "cpu", log_with=list(recipe.tracking), project_dir=job.directory
    )
    accelerator.init_trackers(job.directory.name)
    job.track = lambda values, step: accelerator.log(values, step=step)
    try:
        yield
    finally:
        accelerator.end_training()


def _out_of_memory(recipe: Recipe, rule: DeviceRule, plan: Plan) -> str:
    """What was planned, and which single setting saves how much."""
    tight = plan_recipe(recipe.but("budget=1B"), rule)
    ways = ", ".join(f"{way.setting} (-{format_bytes(way.saved_bytes)})" for way in tight.savings)
    largest = max(plan.rows(), key=lambda row: row[1])
    return (
        f"the device is out of memory, although {format_bytes(plan.peak_bytes)} were planned, most "
        f"of it for {largest[0]} ({format_bytes(largest[1])}). Ways down: {ways or 'none'}"
    )
