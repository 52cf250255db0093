"""A low-rank layer with one gate per component, for methods that learn the rank.

    y = W x + s B diag(g) A drop(x)          g (r,) in fp32, without weight decay

A component whose gate is zero adds nothing, and export leaves it out. SoRA drives gates to zero by
a proximal step, AdaLoRA (which calls them E) by a budget.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import Factors, Role
from qlora_lite.adapters.method import Footprint, lora_footprint
from qlora_lite.methods.lora import LoRALayer
from qlora_lite.model.frozen import FrozenLinear


class GatedLayer(LoRALayer):
    """y = W x + s B diag(g) A drop(x)"""

    roles: ClassVar[dict[str, Role]] = LoRALayer.roles | {"g": Role.GATE}

    gate_name: ClassVar[str] = "g"
    """The gates' parameter, as the method's paper calls it and as saved adapters name it."""

    def __init__(
        self,
        base: FrozenLinear,
        a: Tensor,
        b: Tensor,
        gate: Tensor,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base, a, b, scale, dropout)
        self.register_parameter(self.gate_name, nn.Parameter(gate))

    @property
    def gate(self) -> nn.Parameter:
        """(rank,)"""
        return self.get_parameter(self.gate_name)

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x, self.a.to(x.dtype)) * self.gate.to(x.dtype)
        return F.linear(low, self.b.to(x.dtype)) * self.scale

    def live_factors(self) -> tuple[Tensor, Tensor]:
        return self.a.float(), self.b.float() * (self.scale * self.gate.float())

    def factors(self, rank: int | None = None) -> Factors | None:
        """Without the components whose gate is zero."""
        kept = self.gate.detach() != 0
        if rank is not None and rank < int(kept.sum()):
            return None
        a, b, gate = (t.detach().float() for t in (self.a, self.b, self.gate))
        return Factors(a[kept], b[:, kept] * (self.scale * gate[kept]))

    @torch.no_grad()
    def warm_start(self, factors: Factors) -> None:
        """The components of the pair get a gate of 1."""
        super().warm_start(factors)
        self.gate[: factors.rank] = 1.0

    def trainable_count(self) -> int:
        return super().trainable_count() + self.rank


def gated_footprint(d_in: int, d_out: int, rank: int) -> Footprint:
    """LoRA's two factors and `rank` gates."""
    lora = lora_footprint(d_in, d_out, rank)
    return Footprint(lora.width, lora.trained + rank)
