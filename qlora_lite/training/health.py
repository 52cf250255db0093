"""Checks that stop a run at once if its loss or gradient shows that training cannot work."""

import math
from collections.abc import Callable

from qlora_lite.data.collate import Batch
from qlora_lite.foundation.errors import TrainingError

WORSE_THAN_GUESSING = 1.3
"""A first loss above this many times ln(vocabulary) means that something is broken."""

_DAMAGED_BASE = "The base's weights are damaged, or too large for base.compute"

ShowRows = Callable[[Batch], str]
"""A batch's rows as text, for an error message."""


def check_loss(
    loss: float, batch: Batch, step: int, vocabulary: int, lr: float, show_rows: ShowRows
) -> None:
    """Check the mean loss of a micro-batch in `step` (from 0), before its backward.

    Raises:
        TrainingError: if it is not finite, or above what guessing gives in the first step.
    """
    if step == 0 and not math.isfinite(loss):
        raise TrainingError(
            f"the first loss is {loss}, which is not finite. {_DAMAGED_BASE}. Look at these rows\n"
            f"{show_rows(batch)}"
        )
    if not math.isfinite(loss):
        raise TrainingError(
            f"step {step + 1}: the loss is {loss}, which is not finite. Look at these rows, and "
            f"try a lower optim.lr (now {lr:g})\n{show_rows(batch)}"
        )
    limit = WORSE_THAN_GUESSING * math.log(vocabulary)
    if step == 0 and loss > limit:
        raise TrainingError(
            f"the first loss is {loss:.2f}, above {limit:.2f} = 1.3 ln({vocabulary}): the model "
            "does worse than guessing, so its weights, its tokenizer and the data do not belong "
            f"together. Look at these rows\n{show_rows(batch)}"
        )


def check_heldout_loss(
    loss: float, num_steps: int, lr: float, show_rows: Callable[[], str]
) -> None:
    """Check the held-out loss after `num_steps` steps. `show_rows` returns some training rows.

    Raises:
        TrainingError: if it is not finite.
    """
    if math.isfinite(loss):
        return
    if num_steps:
        raise TrainingError(
            f"after step {num_steps} the held-out loss is {loss}, which is not finite. Try a lower "
            f"optim.lr (now {lr:g})"
        )
    raise TrainingError(
        f"before the first step the held-out loss is {loss}, which is not finite. {_DAMAGED_BASE}. "
        "Rows of this run look like this\n"
        f"{show_rows()}"
    )


def check_gradient(
    norm: float,
    loss: float,
    batch: Batch,
    step: int,
    vocabulary: int,
    lr: float,
    show_rows: ShowRows,
) -> None:
    """Check the gradient norm of `step` (from 0), before clipping. `loss` is the mean of the step.

    Raises:
        TrainingError: if it is zero or not finite.
    """
    if norm != 0 and math.isfinite(norm):
        return
    limit = WORSE_THAN_GUESSING * math.log(vocabulary)
    if step > 0 and (loss > limit or not math.isfinite(norm)):
        raise TrainingError(
            f"step {step + 1}: training diverged: the loss is {loss:.4g} and the gradient norm "
            f"{norm}. The learning rate is too high: try a lower optim.lr (now {lr:g})\n"
            f"{show_rows(batch)}"
        )
    raise TrainingError(
        f"step {step + 1}: the gradient norm is {norm}, so nothing can be learned. Check "
        "adapter.targets, adapter.ranks and the files of the base, which may be damaged, and look "
        f"at these rows\n{show_rows(batch)}"
    )
