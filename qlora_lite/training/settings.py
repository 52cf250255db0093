"""What a user sets about training: the optimizer, the evaluation during the run, checkpoints."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_lite.foundation.settings import Settings
from qlora_lite.memory.formulas import States
from qlora_lite.training.schedule import ScheduleName

Rounding = Literal["master", "stochastic"]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Optim(Settings):
    """How the parameters move, and how much data a step sees."""

    lr: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""

    tokens_per_step: int = Field(default=16_384, ge=1)
    """Processed tokens of an optimizer step, rounded to whole bins."""

    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens that one forward sees; the planner's choice unless given. Never changes the result of
    a step beyond rounding (but for BA-LoRA, whose terms are those of a forward)."""

    epochs: float = Field(default=1.0, gt=0)
    """Passes over the data, in whole steps: the last one is filled up from the next pass."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; overrides `epochs`."""

    schedule: ScheduleName = "cosine"
    """Shape of the learning rate after the warm-up."""

    warmup: float = Field(default=0.03, ge=0)
    """Warm-up as a share of the run (below 1) or as a number of steps."""

    lr_floor: float = Field(default=0.0, ge=0, le=1)
    """Where the schedule ends, relative to `lr`."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapters' matrices."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of Adam's first and second moments."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of Adam's second moment."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""

    checkpointing: bool = True
    """Keep only each layer's input and compute the layer again in backward."""

    states: Literal["auto"] | States = "auto"
    """Adam's moments: fp32, or 8 bit (CUDA), which may be paged to the host."""

    rounding: Rounding = "master"
    """What keeps small updates of bf16 parameters: fp32 master values, or stochastic rounding."""


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
