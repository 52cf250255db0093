"""SoRA: gates between the factors, driven to exact zeros.

    y = W x + s B diag(g) A drop(x)          s = alpha / r_max
    after each step   g <- sign(g) max(|g| - xi, 0)

Ding et al. 2023, arXiv:2311.11696. A gate at zero is a component that export leaves out. It may
come back: its own gradient does not vanish, and one update above xi revives it. g starts N(0, 1),
B at zero.

The released code (TsinghuaC3I/SoRA) was read in full. Its proximal step applies its cases one after
the other: what has shrunk below xi is zeroed too, so that a gate loses xi only from 2 xi on.
`release_prox` does that, the default is the soft threshold of the paper. The paper's threshold is
the learning rate times lambda, the one that the release imports is a constant: `threshold`, or
`threshold_per_lr` times the gates' own rate. A constant makes longer runs sparser; tie it to the
rate where runs of different length are compared. Values of the sparsifying schedule share one run
here, where the release trains anew with each; a list of them fails there. Of its three spacings,
"log_linear" is a straight line to 0.1 % at these sizes, and "exp_linear" is our `log`.

Where we deviate: no loss on |g| beside the proximal step, which the release has by default; `l1` is
one in its place. Layer norms, which the release trains too, are a setting of every method
(`train_norms`). Gates rest in fp32: the shrink of 3e-4 is below what bf16 can say of a number near
1. They do not decay.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import AdapterLayer, Factors, Role
from qlora_lite.adapters.lora import LoRALayer, LoRAMethod
from qlora_lite.adapters.method import Access, AdapterSettings, Footprint, StepInfo
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

Threshold = Annotated[float, Field(ge=0)]


class SoRA(AdapterSettings):
    """Sparse low-rank adaptation: an L1 step on gates decides the rank of every layer."""

    kind: Literal["sora"] = "sora"

    rank: int = Field(default=8, ge=1)
    """The largest rank; `ranks` may change it layer by layer."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of the update; its denominator is the largest rank throughout."""

    threshold: Threshold | Annotated[list[Threshold], Field(min_length=1)] = 3e-4
    """What a step takes off every gate (xi); several values share the run between them (the
    paper's sparsifying schedule)."""

    num_thresholds: int | None = Field(default=None, ge=2)
    """Values of the schedule, spaced between the two of `threshold`; as they are unless given."""

    spacing: Literal["linear", "log"] = "linear"
    """Equal differences between them, or equal ratios."""

    threshold_per_lr: float | None = Field(default=None, ge=0)
    """Threshold relative to the learning rate of the gates (the paper's lambda), in place of
    `threshold`. The authors' numbers are 0.375 (3e-4 at a rate of 8e-4)."""

    l1: float = Field(default=0.0, ge=0)
    """Weight of the mean |g| in the loss, in place of the shrinking (with `threshold=0`)."""

    release_prox: bool = False
    """The proximal step of the released code: what has shrunk below xi is zeroed as well."""

    @model_validator(mode="after")
    def _one_way_to_zero(self) -> Self:
        if self.threshold_per_lr is not None and isinstance(self.threshold, list):
            raise ValueError(
                f"threshold={self.threshold} is a schedule of its own, and threshold_per_lr="
                f"{self.threshold_per_lr} would replace it. Take one of the two"
            )
        if self.l1 and (self.threshold_per_lr or self.threshold != 0):
            raise ValueError(
                f"l1={self.l1} would shrink the gates beside the proximal step. Take threshold=0 "
                "without threshold_per_lr, or l1=0"
            )
        return self

    @model_validator(mode="after")
    def _two_ends(self) -> Self:
        if self.num_thresholds is None:
            return self
        ends = self.threshold if isinstance(self.threshold, list) else [self.threshold]
        if len(ends) != 2 or (self.spacing == "log" and 0 in ends):
            raise ValueError(
                f"num_thresholds={self.num_thresholds} values with spacing={self.spacing} lie "
                f"between two, threshold={self.threshold} does not give these. Write "
                "threshold=[1e-4,7e-4]"
            )
        return self


def soft_threshold(gate: Tensor, width: float) -> Tensor:
    """Proximal step of the L1 norm: towards zero by `width`, stopping at zero."""
    return gate.sign() * (gate.abs() - width).clamp(min=0)


def released_threshold(gate: Tensor, width: float) -> Tensor:
    """What the released code makes of it: what is below `width` afterwards is zero too."""
    shrunk = torch.where(gate.abs() > width, soft_threshold(gate, width), gate)
    return torch.where(shrunk.abs() < width, 0.0, shrunk)


def spaced(first: float, last: float, num: int, spacing: Literal["linear", "log"]) -> list[float]:
    """`num` values between two, both included."""
    shares = [i / (num - 1) for i in range(num)]
    if spacing == "log":
        return [first ** (1 - share) * last**share for share in shares]
    return [first * (1 - share) + last * share for share in shares]


class SoRALayer(LoRALayer):
    """y = W x + s B diag(g) A drop(x)"""

    roles: ClassVar[dict[str, Role]] = LoRALayer.roles | {"g": Role.GATE}

    def __init__(
        self, base: FrozenLinear, a: Tensor, b: Tensor, g: Tensor, scale: float, dropout: float
    ) -> None:
        super().__init__(base, a, b, scale, dropout)
        self.g = nn.Parameter(g)

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x, self.a.to(x.dtype)) * self.g.to(x.dtype)
        return F.linear(low, self.b.to(x.dtype)) * self.scale

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        return self.a.float(), self.b.float() * (self.scale * self.g.float())

    def factors(self, rank: int | None = None) -> Factors | None:
        """Components whose gate is zero are left out."""
        kept = self.g.detach() != 0
        if rank is not None and rank < int(kept.sum()):
            return None
        a, b, g = (t.detach().float() for t in (self.a, self.b, self.g))
        return Factors(a[kept], b[:, kept] * (self.scale * g[kept]))

    def begin_from(self, factors: Factors) -> None:
        """Gates of 1, their mean size at the start; the others keep theirs."""
        super().begin_from(factors)
        self.g.data[: factors.rank] = 1.0

    def trainable_count(self) -> int:
        return super().trainable_count() + self.g.numel()


class SoRAMethod(LoRAMethod):
    """A proximal step on the gates behind every step of the optimizer."""

    settings: SoRA

    def footprint(self, spec: LinearSpec) -> Footprint:
        lora = super().footprint(spec)
        return Footprint(lora.width, lora.trained + self.plans[spec.path].rank)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> AdapterLayer:
        lora = super().build(base, spec, start, generator)
        assert isinstance(lora, LoRALayer)
        gate = torch.randn(lora.a.shape[0], generator=generator)
        return SoRALayer(base, lora.a.data, lora.b.data, gate, lora.scale, lora.dropout)

    def penalty(self) -> Tensor | None:
        if not self.settings.l1:
            return None
        gates = torch.cat([layer.g for layer in self._layers()])
        return self.settings.l1 * gates.abs().mean()

    def after_step(self, access: Access, step: StepInfo) -> None:
        width = threshold_at(self.settings, step)
        if step.skipped or not width:
            return
        shrink = released_threshold if self.settings.release_prox else soft_threshold
        for layer in self._layers():
            access.write(layer.g, shrink(access.read(layer.g), width))

    def _layers(self) -> list[SoRALayer]:
        return [layer for layer in self.layers.values() if isinstance(layer, SoRALayer)]


def threshold_at(settings: SoRA, step: StepInfo) -> float:
    """xi of a step: a constant, one of several that share the run evenly, or tied to the rate."""
    if settings.threshold_per_lr is not None:
        return settings.threshold_per_lr * step.lr * settings.lr_ratio
    values = settings.threshold
    if not isinstance(values, list):
        return values
    if settings.num_thresholds is not None:
        values = spaced(values[0], values[1], settings.num_thresholds, settings.spacing)
    return values[step.step * len(values) // step.total]
