"""The settings of training: optimizer, evaluation during the run, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qlora_lite.foundation.settings import Settings
from qlora_lite.memory.formulas import States
from qlora_lite.training.schedule import ScheduleName

Rounding = Literal["master", "stochastic"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Optim(Settings):
    """The optimizer, its schedule, and the tokens of a step."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""

    tokens_per_step: int = Field(default=16_384, ge=1)
    """Tokens per optimizer step, rounded to whole bins."""

    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward; chosen by the memory plan unless given. Changes a step only by rounding
    (except for BA-LoRA, whose extra losses are computed per forward)."""

    epochs: float = Field(default=1.0, gt=0, le=10**6)
    """Passes over the data, in whole steps: the last step is filled from the next pass."""

    steps: int | None = Field(default=None, ge=1, le=10**9)
    """Optimizer steps, instead of `epochs`."""

    schedule: ScheduleName = "cosine"
    """Shape of the learning-rate schedule after the warm-up."""

    warmup: float = Field(default=0.03, ge=0)
    """Warm-up as a share of the run (below 1) or as a number of steps."""

    lr_floor: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of the schedule, relative to `lr`."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapters' matrices."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of Adam's first and second moments."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of Adam's second moment."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""

    checkpointing: bool = True
    """Gradient checkpointing: store only each layer's input and recompute the layer in backward."""

    states: Literal["auto"] | States = "auto"
    """Dtype of Adam's moments: fp32, or on CUDA 8 bit, optionally paged to the host."""

    rounding: Rounding = "master"
    """How bf16 parameters keep small updates: fp32 master copies, or stochastic rounding."""

    @model_validator(mode="after")
    def _has_one_length(self) -> "Optim":
        if self.steps is not None and self.epochs != type(self).model_fields["epochs"].default:
            raise ValueError(
                f"got steps={self.steps} and epochs={self.epochs:g}, which are two lengths of one "
                "run. Give one of them"
            )
        return self

    @model_validator(mode="after")
    def _has_room_for_the_warmup(self) -> "Optim":
        if self.steps is not None:
            self.require_warmup_within(self.steps)
        return self

    def require_warmup_within(self, steps: int) -> None:
        """Check that the warm-up is not longer than the run.

        Raises:
            ValueError: if it is.
        """
        if self.warmup > max(steps, 1):
            raise ValueError(
                f"got warmup={self.warmup:g}, and the run has {steps} steps. Give fewer steps of "
                "warm-up, or a share of the run below 1"
            )


class Evaluation(Settings):
    """Scoring of the held-out rows during training, and sample answers at the end."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two scorings; by default at most a tenth of the run's time is spent
    on them."""

    rows: int | None = Field(default=None, ge=1)
    """How many held-out rows are scored during the run; by default all of them with `every`, and
    otherwise as many as that tenth allows."""

    patience: int | None = Field(default=None, ge=1)
    """Early stopping: stop after this many scorings without improvement, and keep the best adapter.
    Scorings before AdaLoRA's final budget, or before PRILoRA's first pruning, do not count."""

    samples: int = Field(default=3, ge=0)
    """Held-out prompts that the report shows with the answers of the base and the adapted model."""


class Checkpoints(Settings):
    """Saved states to continue from."""

    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between two checkpoints; a tenth of the run by default."""

    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints are kept."""
