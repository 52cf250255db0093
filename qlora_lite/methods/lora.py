"""LoRA: the update of a weight as a product of two thin matrices.

    y = W x + s B A drop(x)          s = alpha / r,  A (r, d_in),  B (d_out, r)

Hu et al. 2021, arXiv:2106.09685. A starts uniform in +-1/sqrt(d_in) (Kaiming with a = sqrt(5), as
in the released code; the paper says Gaussian). B starts at zero, so the first output equals that of
the base, bit for bit.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import AdapterLayer, Factors, Role
from qlora_lite.adapters.method import AdapterSettings, Method
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec


class LoRA(AdapterSettings):
    """Low-rank adaptation: two thin trained matrices for each adapted weight."""

    kind: Literal["lora"] = "lora"


def kaiming_uniform(rank: int, d_in: int, generator: torch.Generator) -> Tensor:
    """(rank, d_in) in fp32, uniform in +-1/sqrt(d_in)."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)


def fresh_factors(spec: LinearSpec, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (rank, d_in) and B (d_out, rank) at LoRA's start, in fp32: A Kaiming uniform, B zero."""
    return kaiming_uniform(rank, spec.d_in, generator), torch.zeros(spec.d_out, rank)


class LoRALayer(AdapterLayer):
    """y = W x + s B A drop(x)"""

    roles: ClassVar[dict[str, Role]] = {"a": Role.DOWN, "b": Role.UP}

    def __init__(
        self, base: FrozenLinear, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base)
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.rank = a.shape[0]
        self.scale = scale
        self.dropout = dropout

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        return self.a.float(), self.b.float() * self.scale

    def warm_start(self, factors: Factors) -> None:
        if factors.rank > self.rank:
            raise AdapterError(
                f"the adapter to start from has rank {factors.rank}, this layer has rank "
                f"{self.rank}. Set adapter.rank={factors.rank} or more"
            )
        # a smaller pair fills the first components; the others keep their start (B = 0)
        with torch.no_grad():
            self.a[: factors.rank] = factors.down
            self.b[:, : factors.rank] = factors.up / self.scale

    def trainable_count(self) -> int:
        return self.rank * (self.base.d_in + self.base.d_out)


class LoRAMethod(Method[LoRALayer]):
    """LoRA layers; nothing happens around a step."""

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> LoRALayer:
        a, b = fresh_factors(spec, plan.rank, generator)
        return LoRALayer(base, a, b, plan.scale, self.settings.dropout)
