"""Methods whose factors start from a decomposition of the weight: PiSSA, OLoRA, BA-LoRA.

A method of this family finds a product s B0 A0 in the weight W and trains the factors from there.
Two modes keep the initial sum equal to W:

    offset       W is unchanged, the increments a and b start at zero:
                 y = W x + s [b (A0 + a) + B0 a] drop(x)
    requantise   the factors themselves are trained, and the residual is quantised:
                 y = Q(W - s B0 A0) x + s B A drop(x)

Both have the same gradients, so Adam follows the same path. `offset` starts at the base bit for
bit, stores increments that bf16 does not round away, is the true base when disabled, and is
exported losslessly as a LoRA of rank 2r; it stores A0 and B0 in addition. `requantise` is the way
of the papers: only the smaller residual is quantised, and only merged weights can be exported.
Weight decay pulls towards the start in `offset` and towards zero in `requantise`.
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
    """Settings of the methods that start from a decomposition of the weight."""

    mode: Literal["offset", "requantise"] = "offset"
    """Train increments on the unchanged base, or quantise the residual of the base."""


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
    """Subclasses define the decomposition, `factorise`."""

    settings: OffsetSettings

    def factorise(
        self, dense: Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A0 (rank, d_in) and B0 (d_out, rank) from a weight (d_out, d_in), all fp32."""
        raise NotImplementedError

    @property
    def requires(self) -> Requirement:
        return (
            Requirement.ORIGINAL_WEIGHTS if self.settings.mode == "requantise" else Requirement.NONE
        )

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        """Ranks are at most the full rank of the weight."""
        return cut_to_weight(super().plan(specs), specs, self.settings.alpha, self.settings.scaling)

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        rank = plan.rank
        size = rank * (spec.d_in + spec.d_out)
        if self.settings.mode == "requantise":
            return Footprint(rank, size)
        return Footprint(2 * rank, size, frozen=size)

    def split(
        self,
        spec: LinearSpec,
        plan: LayerPlan,
        dense: Tensor,
        round_trip: Callable[[Tensor], Tensor],
        generator: torch.Generator,
        saved: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        if saved is None:
            factors = self.factorise(dense, plan.rank, plan.scale, generator)
            # rounded before the subtraction, so that bf16 parameters can store them exactly
            a0, b0 = (factor.bfloat16().float() for factor in factors)
        else:
            a0, b0 = (saved[name].to(dense.device) for name in ("a0", "b0"))
            require_fit(spec, a0, b0)
        return dense - plan.scale * (b0 @ a0), {"a0": a0, "b0": b0}

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> LoRALayer | OffsetLayer:
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
    """The weight before quantisation, or else the dequantised one, in fp32 on the device."""
    weight = base.original()
    dense = base.dense() if weight is None else weight
    return dense.to(base.device, torch.float32)
