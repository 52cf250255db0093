"""What a method does around a step.

A method from a paper is one file: its settings, its layer, and a `Method` that overrides only the
hooks that the paper changes. Every hook has an empty default, so the training loop calls them all
and knows no method by name. The order inside one optimizer step:

    begin_step -> forward and backward of every micro-batch (with `output_loss`), `penalty` once
    -> before_step (gradients exist) -> clip -> optimizer -> after_step
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from qlora_lite.adapters.layer import AdapterLayer, Role
from qlora_lite.adapters.ranks import LayerPlan, Scaling, rank_of, scale_of
from qlora_lite.foundation.settings import Settings, UserPath
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

FAST = (Role.UP, Role.GATE, Role.MAGNITUDE)
"""Roles trained at `lr_ratio` times the learning rate: up factors and one-dimensional parameters,
as PEFT groups them for LoRA+."""

UNDECAYED = (Role.GATE, Role.MAGNITUDE)
"""Roles without weight decay."""


class AdapterSettings(Settings):
    """What every low-rank method has."""

    kind: str

    rank: int = Field(default=16, ge=1)
    """Rank of the update; `ranks` may change it layer by layer."""

    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scale of the update."""

    scaling: Scaling = "alpha/r"
    """Scale of the update. With alpha/sqrt(r) high ranks keep learning (rsLoRA)."""

    lr_ratio: float = Field(default=1.0, gt=0)
    """Learning rate of the up factors relative to the down factors (LoRA+ takes 16)."""

    targets: str | list[str] = "all-linear"
    """`all-linear`, `attention`, `mlp`, or names and globs: `["q_proj", "*.mlp.*"]`."""

    ranks: dict[str, int] = Field(default_factory=dict)
    """Other ranks by block (`"0"`, `"0-7"`) or by glob of the path; the last match counts, 0 leaves
    the layer alone. More rank in the lower layers: `{"0-7": 32}` (of 16, say)."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""

    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Storage dtype of the trained parameters; `auto` follows the device (bf16 on most)."""

    embedding_rank: int = Field(default=0, ge=0)
    """Rank of a LoRA on the input embedding; 0 is none."""

    train_norms: bool = False
    """Train the norms (scale and bias) as well."""

    train_modules: list[str] = Field(default_factory=list)
    """Fully trained modules, by path or last name: `["lm_head"]`. Linear layers and embeddings are
    stored in fp32, norms in the dtype of the base."""

    start: UserPath | None = None
    """A PEFT adapter directory, or a run's `adapter/`, to start from."""

    @field_validator("ranks")
    @classmethod
    def _no_negative_rank(cls, ranks: dict[str, int]) -> dict[str, int]:
        for pattern, rank in ranks.items():
            if rank < 0:
                raise ValueError(f"rank of {pattern!r} is {rank}; it must be 0 or more")
        return ranks


class Requirement(Flag):
    """What a method needs beyond what every method gets."""

    NONE = 0
    TEACHER_OUTPUT = auto()
    """The base's own logits: a second forward of every batch, without the adapter."""
    ORIGINAL_WEIGHTS = auto()
    """The weights before quantisation. `split` decides what is quantised in their place. Such an
    adapter fits that base only, so it is exported as merged weights, not as a PEFT adapter."""
    QUANTISATION_ERROR = auto()
    """A base with a quantisation error: 16 and 32 bit have none."""


@dataclass(frozen=True)
class Footprint:
    """How many numbers one layer's adapter stores, for the memory plan."""

    width: int
    """Features per token saved for backward between the factors: the rank of a LoRA."""
    trained: int
    frozen: int = 0
    """Buffers in the dtype of the parameters, counted at the end of the run."""
    statistics: int = 0
    """Numbers in fp32 besides the optimizer's state."""

    def scaled(self, share: float) -> "Footprint":
        """The footprint at another rank, assuming that everything is proportional to it."""
        sizes = (self.width, self.trained, self.frozen, self.statistics)
        return Footprint(*(round(size * share) for size in sizes))


def lora_footprint(d_in: int, d_out: int, rank: int) -> Footprint:
    """Two factors, A (rank, d_in) and B (d_out, rank)."""
    return Footprint(rank, rank * (d_in + d_out))


@dataclass(frozen=True)
class StepInfo:
    """The current optimizer step."""

    step: int
    """Counted from 0."""
    total: int
    lr: float
    generator: torch.Generator
    """Seeded by run and step: the same draws after a resume and in every process."""
    seed: int = 0
    """Of the run."""
    skipped: bool = False
    """No parameter changed, because a scaled gradient overflowed."""


@dataclass(frozen=True)
class OutputChunk:
    """Outputs at some trained tokens, (tokens, vocabulary) and (tokens,)."""

    logits: Tensor
    targets: Tensor
    teacher_logits: Tensor | None = None


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    lr_factor: float = 1.0
    """Relative to the run's learning rate."""
    decays: bool = True


class ParameterAccess(Protocol):
    """How a method reads and writes trained parameters, under any engine."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The value that the optimizer keeps (its fp32 master where there is one)."""

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set the parameter, and its master."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None: ...

    def set_gradient(self, parameter: nn.Parameter, value: Tensor) -> None: ...

    def reset_optimizer_state(self, parameter: nn.Parameter, where: Tensor | None = None) -> None:
        """Clear the optimizer's state of a parameter, or of the part where a mask is true."""

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes; the tensor itself in one process.

        A collective operation: every process calls it in the same order, with equal shapes.
        """


def read_rounded(access: ParameterAccess, parameter: nn.Parameter) -> Tensor:
    """The value that the forward uses: `access.read`, rounded to the parameter's own dtype."""
    return access.read(parameter).to(parameter.dtype)


L = TypeVar("L", bound=AdapterLayer)
"""The layer class that a method builds."""


class Method(Generic[L]):
    """One adapter method in one run. Every hook does nothing unless a paper needs it.

    Subclass as `class DoRAMethod(Method[DoRALayer])`: `build` returns layers of that class, and
    `layers` holds them.
    """

    def __init__(self, settings: AdapterSettings) -> None:
        self.settings = settings
        self.layers: dict[str, L] = {}

    logit_copies: ClassVar[int] = 3
    """Chunks of fp32 logits that this method's loss holds at the same time, for the memory plan."""

    @property
    def requires(self) -> Requirement:
        """What this method needs with these settings."""
        return Requirement.NONE

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        """Rank and scale of every adapted layer, before anything is built. Rank 0 is left out."""
        ranks = {s.path: rank_of(s, self.settings.rank, self.settings.ranks) for s in specs}
        alpha, scaling = self.settings.alpha, self.settings.scaling
        return {
            path: LayerPlan(rank, scale_of(alpha, rank, scaling))
            for path, rank in ranks.items()
            if rank > 0
        }

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        """The memory of one layer's adapter: LoRA's two factors unless a method overrides this."""
        return lora_footprint(spec.d_in, spec.d_out, plan.rank)

    def split(
        self,
        spec: LinearSpec,
        plan: LayerPlan,
        dense: Tensor,
        round_trip: Callable[[Tensor], Tensor],
        generator: torch.Generator,
        saved: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Split a weight before quantisation: (what to quantise, tensors for `build`).

        Called for the adapted layers of a method that requires the original weights.

        Args:
            dense: the weight (d_out, d_in) in fp32.
            round_trip: quantises and dequantises a weight.
            saved: the tensors that an earlier call returned, on resume, load and merge. They must
                give the same result to the last bit, so nothing is computed again.
        """
        raise NotImplementedError

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> L:
        """The initialised layer.

        Args:
            start: what `split` returned, or None. On resume, load and merge the saved state of the
                layer (`AdapterLayer.state`), and the split result under its plain names.
            generator: seeded by run and path.
        """
        raise NotImplementedError

    def set_layers(self, layers: Mapping[str, L]) -> None:
        """Called once, when all layers are built and attached."""
        self.layers = dict(layers)

    def groups(self) -> list[ParameterGroup]:
        """Optimizer groups by role: up factors, gates and magnitudes at `lr_ratio` times the
        learning rate; gates and magnitudes without weight decay."""
        by_kind: dict[tuple[float, bool], dict[str, nn.Parameter]] = {}
        for path, layer in self.layers.items():
            for name, parameter in layer.trained().items():
                role = layer.roles[name]
                factor = self.settings.lr_ratio if role in FAST else 1.0
                decays = role not in UNDECAYED
                by_kind.setdefault((factor, decays), {})[f"{path}.{name}"] = parameter
        return [
            ParameterGroup(tuple(members), tuple(members.values()), factor, decays)
            for (factor, decays), members in by_kind.items()
        ]

    def begin_step(self, step: StepInfo) -> None:
        """Once per optimizer step, before the first forward (DyLoRA draws a rank)."""

    def is_settled(self, done: int, total: int) -> bool:
        """Whether the adapter has its final form (AdaLoRA: the final budget) after `done` steps.

        Early stopping waits for it.
        """
        return True

    def penalty(self) -> Tensor | None:
        """A loss on the parameters, added once per optimizer step (AdaLoRA, RM-LoRA)."""
        return None

    def output_loss(self, chunk: OutputChunk) -> Tensor | None:
        """A loss on the outputs, as a sum over the chunk's trained tokens (BA-LoRA)."""
        return None

    def active(self, step: StepInfo) -> Iterable[str]:
        """Paths of the layers that train in this step (XGBLoRA draws a subset)."""
        return self.layers

    def before_step(self, access: ParameterAccess, step: StepInfo) -> None:
        """After backward, before clipping: gradients can be read and set."""

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        """After the optimizer step; gradients still exist (prox, pruning, budgets, restarts)."""

    def schedule_position(self, step: int, total: int) -> tuple[int, int]:
        """Position in the learning rate schedule, and its length, as a pure function of the step.

        A chain of adapters starts the schedule again with every link.
        """
        return step, total

    def lr_scale(self, step: int, total: int) -> float:
        """A factor on the learning rate: warm restarts as a pure function of the step."""
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """What the schedule needs to resume exactly: tensors, numbers and strings by name."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
