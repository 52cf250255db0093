"""One optimizer step, in the order it happens.

    loss = (cross-entropy summed over all trained tokens) / (trained tokens of the whole step)

so that the result does not depend on how the step is cut into micro-batches. Logits exist for
trained tokens only, a chunk at a time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qlora_lite.adapters.method import Method, OutputChunk, StepInfo
from qlora_lite.data.batches import Batch
from qlora_lite.kernels.cross_entropy import linear_cross_entropy
from qlora_lite.model.causal import CausalModel
from qlora_lite.training.engine import TorchEngine


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step measured."""

    loss: float
    """Mean over the step's trained tokens, without penalties."""
    grad_norm: float
    num_tokens: int
    num_targets: int
    skipped: bool


def optimizer_step(
    model: CausalModel,
    batches: Sequence[Batch],
    method: Method,
    engine: TorchEngine,
    step: StepInfo,
    max_grad_norm: float,
    check: Callable[[float, Batch], None],
) -> StepResult:
    """Forward and backward over `batches`, then one move of the parameters.

    `check` sees every micro-batch's mean loss before its backward, and may stop the run.
    """
    method.begin_step(step)
    _activate(method, step)
    num_targets = sum(batch.num_targets for batch in batches)
    loss_sum = 0.0
    for batch in batches:
        last = batch is batches[-1]
        batch_loss = summed_loss(model, batch, method)
        loss_sum += batch_loss.item()
        check(batch_loss.item() / batch.num_targets, batch)
        loss = batch_loss / num_targets
        penalty = method.penalty() if last else None
        engine.backward(loss if penalty is None else loss + penalty, last)
    method.before_step(engine, step)
    grad_norm = engine.step(max_grad_norm, step)
    step = dataclasses.replace(step, skipped=engine.skipped)
    method.after_step(engine, step)
    engine.zero_grad()
    return StepResult(
        loss=loss_sum / num_targets,
        grad_norm=grad_norm,
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_targets=num_targets,
        skipped=engine.skipped,
    )


def _activate(method: Method, step: StepInfo) -> None:
    """Only the layers that the method trains in this step get gradients."""
    active = set(method.active(step))
    for path, layer in method.layers.items():
        for parameter in layer.trained().values():
            parameter.requires_grad_(path in active)


def summed_loss(model: CausalModel, batch: Batch, method: Method) -> Tensor:
    """Cross-entropy summed over a batch's trained tokens, with the method's loss on outputs."""

    def extra(logits: Tensor, targets: Tensor) -> Tensor | None:
        return method.output_loss(OutputChunk(logits, targets))

    batch = batch.to(model.device)
    return linear_cross_entropy(
        model.hidden(batch.input_ids, batch.position_ids),
        batch.targets,
        model.logits,
        extra,
        head_is_trained=model.head_is_trained,
    )
