"""Adapters that start inside the weight: what they take out of it, they give back.

A method of this family (PiSSA, OLoRA, BA-LoRA) finds a product s B0 A0 in the weight W and trains
the factors from there. There are two ways to keep the sum what it was:

    offset       W stays as it is, the increments a and b start at zero:
                 y = W x + s [b (A0 + a) + B0 a] drop(x)
    requantise   the factors themselves are trained, and what is left is quantised:
                 y = Q(W - s B0 A0) x + s B A drop(x)

Both have the same gradients, so Adam follows the same path. `offset` starts at the base bit for
bit, keeps increments that bf16 does not round away, gives the true base when it is switched off,
and leaves losslessly as a LoRA of rank 2r; it holds A0 and B0 beside. `requantise` is the way of
the papers: the quantisation error is that of the smaller rest, and only merged weights leave it.
Weight decay pulls to the start in `offset` and to zero in `requantise`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import AdapterLayer, Role
from qlora_lite.adapters.method import AdapterSettings, Footprint, Method, Requirement
from qlora_lite.adapters.ranks import LayerPlan, cut_to_weight
from qlora_lite.adapters.split_state import require_fit
from qlora_lite.methods.lora import LoRALayer
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec


class OffsetSettings(AdapterSettings):
    """What the methods that start inside the weight have."""

    mode: Literal["offset", "requantise"] = "offset"
    """Train increments beside the untouched base, or quantise what the start leaves of it."""


class OffsetLayer(AdapterLayer):
    """y = W x + s [b (A0 + a) + B0 a] drop(x)"""

    roles: ClassVar[dict[str, Role]] = {"a": Role.DOWN, "b": Role.UP}
    frozen: ClassVar[tuple[str, ...]] = ("a0", "b0")

    a0: Tensor
    b0: Tensor

    def __init__(
        self, base: FrozenLinear, a0: Tensor, b0: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base)
        self.register_buffer("a0", a0)
        self.register_buffer("b0", b0)
        self.a = nn.Parameter(torch.zeros_like(a0))
        self.b = nn.Parameter(torch.zeros_like(b0))
        self.scale = scale
        self.dropout = dropout

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        a0, b0, a, b = (t.to(x.dtype) for t in (self.a0, self.b0, self.a, self.b))
        step = F.linear(x, a)
        return (F.linear(F.linear(x, a0) + step, b) + F.linear(step, b0)) * self.scale

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        a = self.a.float()
        up = torch.cat([self.b.float(), self.b0.float()], dim=1)
        return torch.cat([self.a0.float() + a, a]), up * self.scale

    def trainable_count(self) -> int:
        return self.a0.shape[0] * (self.base.d_in + self.base.d_out)


class OffsetMethod(Method[LoRALayer | OffsetLayer]):
    """A method of this family says what it finds in a weight: `factorise`."""

    settings: OffsetSettings

    def factorise(
        self, dense: Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A0 (rank, d_in) and B0 (d_out, rank) of a weight (d_out, d_in), all fp32."""
        raise NotImplementedError

    @property
    def requires(self) -> Requirement:
        return (
            Requirement.ORIGINAL_WEIGHTS if self.settings.mode == "requantise" else Requirement.NONE
        )

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        """As every method, but no rank is above what the weight itself has."""
        return cut_to_weight(super().plan(specs), specs, self.settings.alpha, self.settings.scaling)

    def footprint(self, spec: LinearSpec) -> Footprint:
        rank = self.plans[spec.path].rank
        size = rank * (spec.d_in + spec.d_out)
        if self.settings.mode == "requantise":
            return Footprint(rank, size)
        return Footprint(2 * rank, size, frozen=size)

    def split(
        self,
        spec: LinearSpec,
        dense: Tensor,
        round_trip: Callable[[Tensor], Tensor],
        generator: torch.Generator,
        saved: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        plan = self.plans[spec.path]
        if saved is None:
            factors = self.factorise(dense, plan.rank, plan.scale, generator)
            # rounded before the subtraction, so that bf16 parameters start exactly at them
            a0, b0 = (factor.bfloat16().float() for factor in factors)
        else:
            a0, b0 = (saved[name].to(dense.device) for name in ("a0", "b0"))
            require_fit(spec, a0, b0)
        return dense - plan.scale * (b0 @ a0), {"a0": a0, "b0": b0}

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> LoRALayer | OffsetLayer:
        plan = self.plans[spec.path]
        if start is None:
            assert self.settings.mode == "offset", f"{spec.path} was loaded without its start"
            dense = original(base)
            a0, b0 = self.factorise(dense, plan.rank, plan.scale, generator)
        else:
            a0, b0 = start["a0"].clone(), start["b0"].clone()
            require_fit(spec, a0, b0)
        if self.settings.mode == "requantise":
            return LoRALayer(base, a0, b0, plan.scale, self.settings.dropout)
        return OffsetLayer(base, a0, b0, plan.scale, self.settings.dropout)


def original(base: FrozenLinear) -> Tensor:
    """The weight as it was before quantisation, or as near as there is, in fp32 on the device."""
    weight = base.original()
    dense = base.dense() if weight is None else weight
    return dense.to(base.device, torch.float32)
