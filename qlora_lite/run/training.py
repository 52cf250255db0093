"""From recipe to adapter: the stages of a run.

check the folder -> set up -> plan -> read data -> load base and adapter -> train -> finish
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_lite.adapters.warm_start import saved_state
from qlora_lite.data.load import PreparedData, load_data
from qlora_lite.foundation.errors import BudgetError
from qlora_lite.foundation.files import Lock, lock
from qlora_lite.foundation.processes import current
from qlora_lite.foundation.units import format_bytes
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.memory.allocator import give_back_freed_memory
from qlora_lite.memory.measure import reset_peak
from qlora_lite.memory.plan import Plan, require_fit, with_rows
from qlora_lite.model.base_files import locate, open_checkpoint
from qlora_lite.recipe import Recipe
from qlora_lite.recipe_files import with_absolute_paths
from qlora_lite.report.page import Sample
from qlora_lite.run.changes import origin_of
from qlora_lite.run.computing import computing_of, rule_of_run, slow_bf16
from qlora_lite.run.finishing import FinishedTraining, finish
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.job import (
    make_job,
    require_known_tokens,
    scorings_of,
    training_batches,
)
from qlora_lite.run.loading import LoadedModel, load_adapted
from qlora_lite.run.offloading import start_offload
from qlora_lite.run.planning import NO_BUDGET, check_settings, not_packed, plan_memory, plan_recipe
from qlora_lite.run.setup import RunSetup, set_up
from qlora_lite.run.tokenizers import tokenizer_to_train
from qlora_lite.run.tracking import require_trackers, tracking
from qlora_lite.training import checkpoint, metrics
from qlora_lite.training.interruption import stop_on_signals
from qlora_lite.training.loop import Progress, TrainingJob, restore_best, train


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run."""

    directory: Path
    already_finished: bool
    steps: int
    scores: dict[str, float]
    """Held-out `loss_before` (before the first step) and `loss`; empty without held-out rows."""
    samples: tuple[Sample, ...]
    predicted_peak_bytes: int
    peak_bytes: int


def run_recipe(
    recipe: Recipe, *, extend: bool = False, watcher: Watcher | None = None
) -> RunResult:
    """Train a recipe, or continue where an earlier process stopped.

    Args:
        extend: train a finished run for longer; only its length may differ.

    Raises:
        QloraLiteError: for everything that the user can fix.
        Interrupted: after SIGINT, SIGTERM or SIGHUP during training, with the state saved.
    """
    watcher = watcher or Watcher()
    recipe = with_absolute_paths(recipe)
    folder = RunFolder(Path(recipe.output))
    if not current().is_main:
        return _run_claimed(recipe, folder, watcher, extend, held=None)
    folder.require_usable(recipe, extend)
    require_trackers(recipe.tracking)
    is_new = not folder.path.exists()
    folder.make()
    with lock(folder.path) as held:
        try:
            return _run_claimed(recipe, folder, watcher, extend, held)
        finally:
            if is_new:
                folder.remove_if_unused()


def _run_claimed(
    recipe: Recipe, folder: RunFolder, watcher: Watcher, extend: bool, held: Lock | None
) -> RunResult:
    """Train in a folder that the main process has locked; `held` is None in the others."""

    def finished_before() -> RunResult | None:
        folder.require_usable(recipe, extend)  # again: it may have changed before we had the lock
        folder.discard_unused_record(recipe)
        if folder.is_finished(recipe):
            folder.require_intact()
            return _result_of_finished(folder)
        checkpoint.clean(folder.checkpoints)
        return None

    result = current().from_main(finished_before)
    if result is not None:
        return result
    try:
        return _train(recipe, folder, watcher, held)
    except Exception:
        if held is not None:
            held.require()  # if the folder was taken away, that is the cause
        raise


def _train(recipe: Recipe, folder: RunFolder, watcher: Watcher, held: Lock | None) -> RunResult:
    processes = current()
    rule = processes.from_main(lambda: rule_of_run(recipe, folder))
    for note in [rule.summary_with_reason, *slow_bf16(rule)]:
        watcher.note(note)
    give_back_freed_memory()
    setup = set_up(recipe, rule)
    partition = start_offload(setup)
    plan = processes.from_main(lambda: plan_memory(setup, folder.micro_batch_tokens))
    watcher.planned(plan)
    _require_budget(recipe, plan, watcher)
    for note in check_settings(setup):
        watcher.note(note)
    tokenizer = processes.first_on_main(lambda: tokenizer_to_train(recipe, folder))
    data = load_data(recipe.data, tokenizer, recipe.seed, watcher.reading)
    require_known_tokens(data, setup)
    plan = _plan_with_rows(plan, data, setup, watcher)
    watcher.prepared(data)

    try:
        resume_from = processes.from_main(
            lambda: checkpoint.find_newest(folder.checkpoints, watcher.note)
        )
        files = processes.first_on_main(lambda: locate(recipe.base, folder.base_files))
        origin = origin_of(recipe, folder.started_with(data.fingerprint, open_checkpoint(files)))
        if resume_from is not None:
            checkpoint.require_origin(resume_from, origin)
            for note in metrics.problems(folder.metrics, checkpoint.step_of(resume_from)):
                watcher.note(note)
        saved = _saved_adapter(recipe, resume_from)
        loaded = load_adapted(setup, tokenizer, watcher, saved, files, partition)
        if setup.facts.packs and not loaded.packs:
            watcher.note(not_packed(recipe))
        micro_batch_tokens = recipe.optim.micro_batch_tokens or plan.micro_batch_tokens
        batches = training_batches(recipe, data, micro_batch_tokens, loaded.packs, processes.world)
        folder.require_not_shorter(batches.steps)
        scorings = scorings_of(recipe, data, batches.steps, folder.scored_rows)
        if len(scorings.rows) < len(data.heldout):
            watcher.note(
                f"{len(scorings.rows)} of {len(data.heldout):,} held-out rows are scored, so that "
                "scoring takes at most a tenth of the run. Set evaluation.rows for more; "
                f"`qlora-lite eval {folder.path}` scores all of them"
            )
        fingerprints = processes.from_main(
            lambda: folder.fingerprints(data.fingerprint, loaded.base.checkpoint)
        )
        if "base_sha256" not in fingerprints:
            watcher.note(
                "the base is large: samples of its files were compared now, every byte is hashed "
                "when the run ends and compared by `merge`"
            )
        with (
            tracking(recipe, folder.path, processes) as track,
            stop_on_signals(processes) as stop_request,
        ):
            job = make_job(
                setup,
                loaded,
                data,
                batches,
                scorings,
                directory=folder.path,
                origin=origin,
                resume_from=resume_from,
                stop_request=stop_request,
                watcher=watcher,
                track=track,
                require_folder=held.require if held is not None else lambda: None,
            )
            job.require_folder()
            warnings = processes.from_main(
                lambda: folder.record(
                    recipe,
                    fingerprints,
                    rule.summary,
                    computing_of(rule),
                    micro_batch_tokens,
                    len(scorings.rows),
                )
            )
            for warning in warnings:
                watcher.note(warning)
            reset_peak(rule.device)
            progress = train(job)
            if stop_request.agreed(processes):
                stop_request.raise_if_requested("after the last step, with its state saved")
            give_back_freed_memory()
    except torch.OutOfMemoryError as error:
        raise BudgetError(_out_of_memory(setup, plan)) from error
    finally:
        watcher.ended()
    return _finish(setup, folder, loaded, data, plan, job, progress)


def _finish(
    setup: RunSetup,
    folder: RunFolder,
    loaded: LoadedModel,
    data: PreparedData,
    plan: Plan,
    job: TrainingJob,
    progress: Progress,
) -> RunResult:
    """Samples, the report and the adapter's files, from the best or the last step."""
    if job.keeps_best:
        restore_best(job)
    assert loaded.attached is not None
    finished = FinishedTraining(
        recipe=setup.recipe,
        folder=folder,
        loaded=loaded,
        attached=loaded.attached,
        data=data,
        plan=plan,
        progress=progress,
        keeps_best=job.keeps_best,
        require_folder=job.require_folder,
        engine=job.engine,
    )
    outcome = finish(finished)
    return RunResult(
        folder.path,
        already_finished=False,
        steps=finished.saved_step,
        scores=outcome.scores,
        samples=outcome.samples,
        predicted_peak_bytes=plan.ledger.measured_bytes,
        peak_bytes=outcome.peak_bytes,
    )


def _result_of_finished(folder: RunFolder) -> RunResult:
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


def _saved_adapter(recipe: Recipe, resume_from: Path | None) -> dict[str, Tensor] | None:
    """The adapter's state in the checkpoint, else that of `adapter.start` if its settings match."""
    if resume_from is not None:
        return checkpoint.load_adapter(resume_from)
    start = recipe.adapter.start
    return None if start is None else saved_state(Path(start), recipe.adapter)


def _require_budget(recipe: Recipe, plan: Plan, watcher: Watcher) -> None:
    """A given budget is a limit. Free memory may change, so exceeding it only gives a note."""
    if recipe.budget:
        require_fit(plan)
    elif not plan.fits:
        watcher.note(f"{plan.verdict}; {NO_BUDGET}, and the run may fail for lack of memory")


def _plan_with_rows(plan: Plan, data: PreparedData, setup: RunSetup, watcher: Watcher) -> Plan:
    """The plan with the memory of the rows, and a note if the run fitted without them only."""
    num_tokens = data.train.num_tokens + data.heldout.num_tokens
    num_rows = len(data.train) + len(data.heldout)
    packing = setup.recipe.data.packing and setup.facts.packs
    is_cpu = setup.rule.device.type == "cpu"
    changed = with_rows(plan, num_tokens, num_rows, packing=packing, is_cpu=is_cpu)
    if plan.fits and not changed.fits:
        watcher.note(
            f"with its {num_rows:,} rows ({format_bytes(changed.peak_bytes - plan.peak_bytes)}) "
            f"the run {changed.verdict}, and may fail for lack of memory. Set data.max_rows to "
            "read fewer"
        )
    return changed


def _out_of_memory(setup: RunSetup, plan: Plan) -> str:
    """The planned memory, and what changing one setting would save."""
    tight = plan_recipe(setup.recipe.but("budget=1B"), setup.rule)
    savings = ", ".join(f"{s.setting} (-{format_bytes(s.saved_bytes)})" for s in tight.savings)
    largest = max(plan.rows(), key=lambda row: row[1])
    return (
        f"the device is out of memory, although only {format_bytes(plan.peak_bytes)} were planned "
        f"(most of it for {largest[0]}: {format_bytes(largest[1])}). Settings that save memory: "
        f"{savings or 'none'}"
    )
