"""From the first step to the last: schedule, steps, evaluation, checkpoints, and when to stop.

The loop knows no adapter method by name, prints nothing, and draws every random number from the
seed and the step, so that a run that was killed goes on as if it had not been.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.method import StepInfo
from qlora_lite.data.batches import Batch
from qlora_lite.foundation.errors import TrainingError
from qlora_lite.foundation.files import complete_directory
from qlora_lite.foundation.seeds import derive, generator
from qlora_lite.foundation.settings import Settings
from qlora_lite.foundation.watch import Watcher
from qlora_lite.memory.measure import peak_bytes
from qlora_lite.model.causal import CausalModel
from qlora_lite.shards.writer import save_tensors
from qlora_lite.training import checkpoint
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.interruption import StopRequest
from qlora_lite.training.metrics import MetricsLog
from qlora_lite.training.optimizer import Optim
from qlora_lite.training.schedule import lr_factor, warmup_steps
from qlora_lite.training.step import StepResult, optimizer_step, summed_loss

ABSURD_FIRST_LOSS = 1.3
"""Times ln(vocabulary): above it the model does worse than guessing, so something is broken."""


class Evaluation(Settings):
    """Scoring of the held-out rows during training, and what a reader sees of them at the end."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two scorings; a tenth of the run unless given."""

    patience: int | None = Field(default=None, ge=1)
    """Stop after this many scorings without a better one, and keep the best adapter. Scorings
    before AdaLoRA's final budget, or before PRILoRA's first pruning, do not count."""

    samples: int = Field(default=3, ge=0)
    """Held-out prompts that the bare base and the adapted model answer for the report."""


class Checkpoints(Settings):
    """Saved states to continue from."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two checkpoints; a tenth of the run unless given."""

    keep: int = Field(default=2, ge=1)
    """How many of the newest are kept."""


class Steps(Protocol):
    """The data of every optimizer step, as a pure function of its number."""

    @property
    def steps(self) -> int: ...

    def step(self, number: int) -> list[Batch]: ...

    def largest_batch(self) -> Batch: ...

    def epoch(self, number: int) -> float: ...


@dataclass
class Progress:
    """How far a run is. Checkpoints carry it."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_loss: float | None = None
    """Of the held-out rows, before the first step."""
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    scorings_since_best: int = 0
    stopped_early: bool = False
    total: int = 0
    """Steps that the run was to have: another number means that it was extended since."""


@dataclass
class TrainingJob:
    """What a training run works with."""

    model: CausalModel
    attached: AttachedAdapter
    engine: TorchEngine
    batches: Steps
    optim: Optim
    seed: int
    directory: Path
    """The run's folder."""
    vocabulary: int
    evaluation: Evaluation
    checkpoints: Checkpoints
    score: Callable[[], dict[str, float]] | None
    """Scores the held-out rows: at least `loss`."""
    show_rows: Callable[[Batch], str]
    """A batch's rows as text, for an error message."""
    request: StopRequest
    """Whether somebody asked the run to stop."""
    resume_from: checkpoint.TrainingState | None = None
    """The newest good checkpoint, where there is one; given up once it is in place."""
    watcher: Watcher = field(default_factory=Watcher)
    track: Callable[[dict[str, Any], int], None] = lambda values, step: None
    """Hands metrics to the trackers that were asked for."""

    @property
    def total(self) -> int:
        return self.batches.steps

    @property
    def keeps_best(self) -> bool:
        """Early stopping is on, so the best adapter is the result and not the last."""
        return self.evaluation.patience is not None and self.score is not None

    @property
    def log(self) -> MetricsLog:
        return MetricsLog(self.directory / "metrics.jsonl")

    @property
    def checkpoint_directory(self) -> Path:
        return self.directory / "checkpoints"


def train(job: TrainingJob) -> Progress:
    """Go on from `resume_from`, or begin; return when the last step is saved.

    Raises:
        Interrupted: after SIGINT or SIGTERM, with the state saved.
        TrainingError: if going on would be pointless; says why and shows the rows.
    """
    progress = _resume(job)
    job.watcher.started(progress.step, job.total)
    if progress.step == 0:
        _memory_dry_run(job)
        if job.score:
            _evaluate(job, progress)
    while progress.step < job.total and not progress.stopped_early:
        _one_step(job, progress)
        if _is_due(progress.step, job.evaluation.every, job.total) and job.score:
            _evaluate(job, progress)
        done = progress.step == job.total or progress.stopped_early
        is_asked = job.request.signal_name is not None
        if done or is_asked or _is_due(progress.step, job.checkpoints.every, job.total):
            _save(job, progress)
        if not done:
            job.request.raise_if_requested(f"after step {progress.step}, with its state saved")
    return progress


def _one_step(job: TrainingJob, progress: Progress) -> None:
    began = time.perf_counter()
    number = progress.step
    method = job.attached.method
    torch.manual_seed(derive(job.seed, "step", number))
    position, length = method.schedule_position(number, job.total)
    warmup = warmup_steps(job.optim.warmup, length)
    factor = lr_factor(position, length, warmup, job.optim.schedule, job.optim.lr_floor)
    lr = job.optim.lr * factor * method.lr_scale(number, job.total)
    step = StepInfo(number, job.total, lr, generator(job.seed, "method", number))
    result = optimizer_step(
        job.model,
        job.batches.step(number),
        job.attached,
        job.engine,
        step,
        job.optim.max_grad_norm,
        lambda loss, batch: _check_loss(job, number, loss, batch),
    )
    _check_gradient(job, number, result)
    elapsed = time.perf_counter() - began
    progress.step += 1
    progress.tokens += result.num_tokens
    progress.seconds += elapsed
    metrics = {
        "step": progress.step,
        "epoch": job.batches.epoch(number),
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
    job.log.append(metrics)
    job.track(metrics, progress.step)
    job.watcher.stepped(metrics)


def _evaluate(job: TrainingJob, progress: Progress) -> None:
    assert job.score is not None
    began = time.perf_counter()
    scores = {f"heldout_{name}": value for name, value in job.score().items()}
    loss = scores["heldout_loss"]
    if not math.isfinite(loss):
        raise TrainingError(_not_finite(job, progress.step, loss))
    progress.seconds += time.perf_counter() - began
    progress.last_loss = loss
    if progress.step == 0:
        progress.first_loss = loss
    is_last = progress.step == job.total
    if is_last or job.attached.method.is_settled(progress.step, job.total):
        _compare_with_best(job, progress, loss)
    metrics = {"step": progress.step, **scores, "seconds": progress.seconds}
    job.log.append(metrics)
    job.track(metrics, progress.step)
    job.watcher.evaluated(metrics)


def _compare_with_best(job: TrainingJob, progress: Progress, loss: float) -> None:
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        progress.scorings_since_best = 0
        if job.keeps_best:
            _save_best(job)
    else:
        progress.scorings_since_best += 1
    patience = job.evaluation.patience
    progress.stopped_early = patience is not None and progress.scorings_since_best >= patience


def _is_due(step: int, every: int | None, total: int) -> bool:
    return step % (every or math.ceil(total / 10)) == 0 or step == total


# -- saving and resuming ---------------------------------------------------------------------------


def _save(job: TrainingJob, progress: Progress) -> None:
    job.log.sync()
    state = checkpoint.TrainingState(
        adapter=job.attached.state(),
        optimizer=job.engine.optimizer.state_dict(),
        method=job.attached.method.state_dict(),
        progress=asdict(progress) | {"loss_scaler": job.engine.scaler.state_dict()},
    )
    checkpoint.save(job.checkpoint_directory, progress.step, state, job.checkpoints.keep)
    job.watcher.saved(progress.step)


def _resume(job: TrainingJob) -> Progress:
    """The state to go on from, and the log up to it; or a beginning."""
    state, job.resume_from = job.resume_from, None
    if state is None:
        job.log.clear()
        return Progress(total=job.total)
    job.attached.load_state(state.adapter)
    job.engine.optimizer.load_state_dict(state.optimizer)
    job.attached.method.load_state_dict(state.method)
    numbers = dict(state.progress)
    job.engine.scaler.load_state_dict(numbers.pop("loss_scaler"))
    progress = Progress(**numbers)
    if progress.total != job.total:  # extended since: early stopping begins to count anew
        progress.total, progress.stopped_early, progress.scorings_since_best = job.total, False, 0
    job.log.rewind(progress.step)
    return progress


def _save_best(job: TrainingJob) -> None:
    with complete_directory(job.checkpoint_directory / "best") as aside:
        save_tensors(job.attached.state(), aside / "adapter.safetensors")


def restore_best(job: TrainingJob) -> None:
    """The adapter of the best scoring, where early stopping kept it."""
    from safetensors.torch import load_file

    best = load_file(job.checkpoint_directory / "best" / "adapter.safetensors")
    job.attached.load_state(best)


# -- reasons to stop at once -----------------------------------------------------------------------


def _memory_dry_run(job: TrainingJob) -> None:
    """Forward and backward on the largest micro-batch: what does not fit fails now."""
    batch = job.batches.largest_batch()
    loss = summed_loss(job.model, batch, job.attached).total / batch.num_targets
    job.engine.backward(loss, last=False)
    job.engine.zero_grad()


def _check_loss(job: TrainingJob, number: int, loss: float, batch: Batch) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"step {number + 1}: the loss is {loss}. A finite one is needed; look at these rows, "
            f"and try a lower optim.lr (now {job.optim.lr:g})\n{job.show_rows(batch)}"
        )
    limit = ABSURD_FIRST_LOSS * math.log(job.vocabulary)
    if number == 0 and loss > limit:
        raise TrainingError(
            f"the first loss is {loss:.2f}, above {limit:.2f} = 1.3 ln({job.vocabulary}): the "
            "model does worse than guessing. Its weights, its tokenizer or the data do not belong "
            f"together; look at these rows\n{job.show_rows(batch)}"
        )


def _not_finite(job: TrainingJob, step: int, loss: float) -> str:
    """Of the held-out rows; before the first step the rate is not to blame."""
    if step:
        return (
            f"after step {step} the held-out loss is {loss}. A finite one is needed: try a lower "
            f"optim.lr (now {job.optim.lr:g})"
        )
    return (
        f"before the first step the held-out loss is {loss}, and a finite one is needed. The "
        "base's weights are damaged, or too large for base.compute. It reads rows such as these\n"
        f"{job.show_rows(job.batches.step(0)[0])}"
    )


def _check_gradient(job: TrainingJob, number: int, result: StepResult) -> None:
    if result.skipped:
        return
    if result.grad_norm == 0 or not math.isfinite(result.grad_norm):
        rows = job.show_rows(job.batches.step(number)[0])
        raise TrainingError(
            f"step {number + 1}: the gradient norm is {result.grad_norm}, so nothing can be "
            "learned. Check adapter.targets and adapter.ranks, and look at these rows\n" + rows
        )
