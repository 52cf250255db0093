"""From the first step to the last: schedule, steps, evaluation, checkpoints, and when to stop.

The loop does not depend on the adapter method and prints nothing. Every random number depends on
the seed and the step only, so a run that was killed continues bit for bit.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.data.batches import share_of
from qlora_lite.data.collate import Batch
from qlora_lite.foundation.processes import Processes
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.memory.measure import peak_bytes
from qlora_lite.model.causal import CausalModel
from qlora_lite.training import checkpoint
from qlora_lite.training.engine import Engine
from qlora_lite.training.health import ShowRows, check_gradient, check_heldout_loss, check_loss
from qlora_lite.training.interruption import StopRequest
from qlora_lite.training.metrics import MetricsLog
from qlora_lite.training.settings import Checkpoints, Evaluation, Optim
from qlora_lite.training.step import StepResult, optimizer_step, prepare_step, summed_loss


class StepBatches(Protocol):
    """The batches of every optimizer step, as a pure function of the step's number."""

    @property
    def steps(self) -> int: ...

    def step(self, number: int) -> list[Batch]: ...

    def largest_batch(self) -> Batch: ...

    def epoch(self, number: int) -> float: ...


@dataclass
class Progress:
    """How far a run is. Saved in checkpoints."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    """Held-out loss before the first step."""
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    scorings_since_best: int = 0
    stopped_early: bool = False
    total: int = 0
    """The planned number of steps. If the job has more, the run is being extended."""


@dataclass(frozen=True)
class TrainingJob:
    """What a training run works with."""

    model: CausalModel
    attached: AttachedAdapter
    engine: Engine
    batches: StepBatches
    optim: Optim
    seed: int
    directory: Path
    """The run's folder."""
    vocabulary: int
    evaluation: Evaluation
    checkpoints: Checkpoints
    score: Callable[[], dict[str, float]] | None
    """Scores held-out rows: at least `loss`. None if there are none."""
    score_every: int
    """Steps between two scorings."""
    show_rows: ShowRows
    stop_request: StopRequest
    """Whether a signal asked the run to stop."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What the result depends on, by name; recorded in checkpoints."""
    resume_from: Path | None = None
    """The checkpoint to continue from."""
    watcher: Watcher = field(default_factory=Watcher)
    track: Callable[[dict[str, Any], int], None] = lambda values, step: None
    """Sends metrics to the trackers."""
    require_folder: Callable[[], None] = lambda: None
    """Raises RunError if the run's folder was taken away. Called before each write."""

    @property
    def total(self) -> int:
        return self.batches.steps

    @property
    def processes(self) -> Processes:
        """Those that train together. Only the main one writes."""
        return self.engine.processes

    @property
    def keeps_best(self) -> bool:
        """Whether the best adapter is the result (early stopping), not the last."""
        return self.evaluation.patience is not None and self.score is not None

    @property
    def log(self) -> MetricsLog:
        return MetricsLog(self.directory / "metrics.jsonl", writes=self.processes.is_main)

    @property
    def checkpoint_directory(self) -> Path:
        return self.directory / "checkpoints"


def train(job: TrainingJob) -> Progress:
    """Train to the last step, from the first one or from `resume_from`.

    Raises:
        Interrupted: after a signal to stop, with the state saved.
        TrainingError: if the loss or gradient shows that training cannot work.
    """
    progress = _resume(job)
    job.watcher.started(progress.step, job.total)
    if progress.step == 0:
        _memory_dry_run(job)
        if job.score:
            _evaluate(job, progress)
    while progress.step < job.total and not progress.stopped_early:
        _one_step(job, progress)
        if _is_due(progress.step, job.score_every, job.total) and job.score:
            _evaluate(job, progress)
        done = progress.step == job.total or progress.stopped_early
        should_stop = job.stop_request.agreed(job.processes)
        if done or should_stop or _is_due(progress.step, job.checkpoints.every, job.total):
            _save(job, progress)
        if not done and should_stop:
            job.stop_request.raise_if_requested(f"after step {progress.step}, with its state saved")
    return progress


def _memory_dry_run(job: TrainingJob) -> None:
    """Forward and backward on the largest micro-batch: if it does not fit, fail now."""
    batch = job.batches.largest_batch()
    loss = job.engine.forward(lambda: summed_loss(job.model, batch, job.attached).total)
    job.engine.backward(loss / batch.num_targets, last=False)
    job.engine.zero_grad()


def _one_step(job: TrainingJob, progress: Progress) -> None:
    start = time.perf_counter()
    number = progress.step
    batches = share_of(job.batches.step(number), job.processes)
    step = prepare_step(job.attached.method, job.optim, job.seed, number, job.total)
    result = optimizer_step(
        job.model,
        batches,
        job.attached,
        job.engine,
        step,
        job.optim.max_grad_norm,
        lambda loss, batch: check_loss(
            loss, batch, number, job.vocabulary, job.optim.lr, job.show_rows
        ),
    )
    if not result.skipped:
        check_gradient(
            result.grad_norm,
            result.loss,
            batches[0],
            number,
            job.vocabulary,
            job.optim.lr,
            job.show_rows,
        )
    elapsed = time.perf_counter() - start
    progress.step += 1
    progress.tokens += result.num_tokens
    progress.seconds += elapsed
    metrics = _step_metrics(job, progress, result, step.lr, elapsed)
    job.require_folder()
    job.log.append(metrics)
    job.track(metrics, progress.step)
    job.watcher.stepped(metrics)


def _step_metrics(
    job: TrainingJob, progress: Progress, result: StepResult, lr: float, elapsed: float
) -> dict[str, Any]:
    metrics = {
        "step": progress.step,
        "epoch": job.batches.epoch(progress.step - 1),
        "tokens": progress.tokens,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "trained_tokens": result.num_targets,
        "tokens_per_second": result.num_tokens / elapsed,
        "seconds": progress.seconds,
        "peak_bytes": peak_bytes(job.model.device),
    }
    if result.added:
        metrics["added_loss"] = result.added
    if result.skipped:
        metrics["skipped"] = True
    return metrics


def _evaluate(job: TrainingJob, progress: Progress) -> None:
    assert job.score is not None
    start = time.perf_counter()
    scores = {f"heldout_{name}": value for name, value in job.score().items()}
    loss = scores["heldout_loss"]
    check_heldout_loss(
        loss, progress.step, job.optim.lr, lambda: job.show_rows(job.batches.step(0)[0])
    )
    progress.seconds += time.perf_counter() - start
    progress.last_loss = loss
    if progress.step == 0:
        progress.first_loss = loss
    is_last = progress.step == job.total
    if is_last or job.attached.method.is_settled(progress.step, job.total):
        _compare_with_best(job, progress, loss)
    metrics = {"step": progress.step, **scores, "seconds": progress.seconds}
    job.require_folder()
    job.log.append(metrics)
    job.track(metrics, progress.step)
    job.watcher.evaluated(metrics)


def _compare_with_best(job: TrainingJob, progress: Progress, loss: float) -> None:
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        progress.scorings_since_best = 0
        if job.keeps_best:
            job.require_folder()
            if job.processes.is_main:
                checkpoint.save_best(job.checkpoint_directory, job.attached.state(), job.origin)
    else:
        progress.scorings_since_best += 1
    patience = job.evaluation.patience
    progress.stopped_early = patience is not None and progress.scorings_since_best >= patience


def _is_due(step: int, every: int | None, total: int) -> bool:
    return step % (every or math.ceil(total / 10)) == 0 or step == total


# -- saving and resuming ---------------------------------------------------------------------------


def _save(job: TrainingJob, progress: Progress) -> None:
    job.require_folder()
    job.log.sync()
    state = checkpoint.TrainingState(
        adapter=job.attached.state(),
        engine=job.engine.state_dict(),
        method=job.attached.method.state_dict(),
        progress=asdict(progress),
        origin=job.origin,
    )
    if job.processes.is_main:
        checkpoint.save(job.checkpoint_directory, progress.step, state, job.checkpoints.keep)
    job.watcher.saved(progress.step)


def _resume(job: TrainingJob) -> Progress:
    """Load the checkpoint and cut the log back to it; without one, start at step 0."""
    job.require_folder()
    if job.resume_from is None:
        job.log.clear()
        return Progress(total=job.total)
    state = checkpoint.load(job.resume_from)
    job.attached.load_state(state.adapter)
    try:
        job.engine.load_state_dict(state.engine)
        job.attached.method.load_state_dict(state.method)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # a file that can be read, but with other names, types or shapes than we write
        raise checkpoint.damaged(job.resume_from, error) from error
    progress = Progress(**state.progress)
    if progress.total != job.total:  # extended: early stopping counts from here on
        progress.total, progress.stopped_early, progress.scorings_since_best = job.total, False, 0
    job.log.rewind(progress.step)
    return progress


def restore_best(job: TrainingJob) -> None:
    """Load the adapter with the best held-out loss, saved during training."""
    best = checkpoint.load_best(job.checkpoint_directory, job.origin)
    job.attached.load_state(best)
    for name, parameter in job.attached.parameters().items():
        job.engine.write(parameter, best[name])
