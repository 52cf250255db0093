"""One optimizer step, in the order it happens.

    loss = (cross-entropy summed over all trained tokens) / (trained tokens of the whole step)

so that the result does not depend on the split into micro-batches. Logits are computed for
trained tokens only, a chunk at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.method import Method, OutputChunk, Requirement, StepInfo
from qlora_lite.data.collate import Batch
from qlora_lite.foundation.seeds import derive, generator
from qlora_lite.kernels.cross_entropy import linear_cross_entropy
from qlora_lite.model.causal import CausalModel
from qlora_lite.training.engine import Engine
from qlora_lite.training.schedule import lr_factor, warmup_steps
from qlora_lite.training.settings import Optim


@dataclass(frozen=True)
class StepResult:
    """The measurements of one optimizer step."""

    loss: float
    """Mean cross-entropy over the step's trained tokens."""
    added: float
    """Mean of the method's extra loss on the outputs, over the same tokens."""
    grad_norm: float
    num_tokens: int
    num_targets: int
    skipped: bool


def prepare_step(method: Method, optim: Optim, seed: int, number: int, total: int) -> StepInfo:
    """The learning rate and the random numbers of step `number` of `total` (from 0).

    They depend only on the seed and the step, so a resumed run is identical.
    """
    position, length = method.schedule_position(number, total)
    warmup = warmup_steps(optim.warmup, length)
    factor = lr_factor(position, length, warmup, optim.schedule, optim.lr_floor)
    lr = optim.lr * factor * method.lr_scale(number, total)
    return StepInfo(number, total, lr, generator(seed, "method", number), seed)


def seed_dropout(step: StepInfo, number: int) -> None:
    """Seed the dropout of batch `number` of a step, whichever process computes it."""
    torch.manual_seed(derive(step.seed, "step", step.step, number))


def optimizer_step(
    model: CausalModel,
    batches: Sequence[Batch],
    attached: AttachedAdapter,
    engine: Engine,
    step: StepInfo,
    max_grad_norm: float,
    check: Callable[[float, Batch], None],
) -> StepResult:
    """Forward and backward over `batches`, then one update of the parameters.

    Args:
        batches: those of this process. Together the processes have all batches of the step.
        check: called with every micro-batch's mean loss before its backward. It may raise.
    """
    method = attached.method
    method.begin_step(step)
    _freeze_inactive(method, step)
    num_targets = int(engine.sum_over_ranks(torch.tensor(sum(b.num_targets for b in batches))))
    loss_sum = added = 0.0
    for batch in batches:
        seed_dropout(step, batch.number)
        attached.train(not batch.is_filler)
        is_last = batch is batches[-1]
        loss, batch_loss = engine.forward(
            partial(_step_loss, model, batch, engine, attached, num_targets, is_last=is_last)
        )
        cross_entropy = batch_loss.total.item() - batch_loss.added
        loss_sum += cross_entropy
        added += batch_loss.added
        if not batch.is_filler:
            check(cross_entropy / batch.num_targets, batch)
        engine.backward(loss, is_last)
    attached.train()
    method.before_step(engine, step)
    grad_norm = engine.step(max_grad_norm, step)
    step = dataclasses.replace(step, skipped=engine.skipped)
    method.after_step(engine, step)
    engine.zero_grad()
    num_tokens = sum(batch.num_tokens for batch in batches)
    sums = engine.sum_over_ranks(torch.tensor([loss_sum, added, num_tokens], dtype=torch.float64))
    loss_sum, added, num_tokens = sums.tolist()
    return StepResult(
        loss=loss_sum / num_targets,
        added=added / num_targets,
        grad_norm=grad_norm,
        num_tokens=int(num_tokens),
        num_targets=num_targets,
        skipped=engine.skipped,
    )


def _step_loss(
    model: CausalModel,
    batch: Batch,
    engine: Engine,
    attached: AttachedAdapter,
    num_targets: int,
    *,
    is_last: bool,
) -> tuple[Tensor, "BatchLoss"]:
    """A micro-batch's part of the step's loss, with the penalty in the last one; and its own loss.

    The penalty is added once per step, so every process adds its share of it.
    """
    batch_loss = summed_loss(model, batch, attached)
    loss = batch_loss.total / num_targets
    penalty = attached.method.penalty() if is_last else None
    if penalty is not None:
        loss = loss + penalty / engine.processes.world
    return loss, batch_loss


def _freeze_inactive(method: Method, step: StepInfo) -> None:
    """Turn off gradients of the layers that the method does not train in this step."""
    active = set(method.active(step))
    for path, layer in method.layers.items():
        for parameter in layer.trained().values():
            parameter.requires_grad_(path in active)


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one micro-batch, summed over its trained tokens."""

    total: Tensor
    """Cross-entropy plus the method's extra loss on the outputs."""
    added: float
    """The method's extra loss alone."""


def summed_loss(model: CausalModel, batch: Batch, attached: AttachedAdapter) -> BatchLoss:
    """Forward through the model, then compute the loss chunk by chunk over the trained tokens."""
    method = attached.method
    batch = batch.to(model.device)
    teacher: Tensor | None = None
    if Requirement.TEACHER_OUTPUT in method.requires:
        with torch.no_grad(), attached.disabled():
            teacher = model.hidden(batch.input_ids, batch.position_ids)
    added = 0.0

    def extra(logits: Tensor, targets: Tensor, teacher_hidden: Tensor | None) -> Tensor | None:
        nonlocal added
        teacher_logits: Tensor | None = None
        if teacher_hidden is not None:
            with torch.no_grad(), attached.disabled():
                teacher_logits = model.logits(teacher_hidden)
        more = method.output_loss(OutputChunk(logits, targets, teacher_logits))
        if more is not None:
            added += more.item()
        return more

    hidden = model.hidden(batch.input_ids, batch.position_ids)
    with model.head.gathered():
        total = linear_cross_entropy(
            hidden,
            batch.targets,
            model.logits,
            extra,
            extra_inputs=teacher,
            head_is_trained=model.head_is_trained,
        )
    return BatchLoss(total, added)
