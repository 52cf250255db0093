"""MELoRA: an ensemble of mini LoRAs, each on its own slice of the inputs and outputs.

    y = W x + s blockdiag(B_1 A_1, ..., B_n A_n) drop(x)

    s = alpha / r,  A_i (r, d_in / n),  B_i (d_out / n, r)

Ren et al. 2024, arXiv:2402.17263: n pairs of rank r give an update of rank n r with the parameters
of one LoRA of rank r, r (d_in + d_out). Every A_i starts like LoRA's A over its d_in / n inputs and
every B_i at zero, so the first output equals that of the base, bit for bit. The defaults are those
of the authors' Llama-2-7B script (n = 8, r = 1, alpha = 16, on q_proj and v_proj with a learning
rate of 3e-4).

A slice of the inputs reaches only its own slice of the outputs. The slices of k_proj and v_proj cut
through heads unless n divides the number of key-value heads.

Where we deviate: all minis run as one batched product and have the same rank. The released code
(ChasonShi/MELoRA) rounds the slice sizes down: if n does not divide the inputs it drops the last
ones, and if n does not divide the outputs the sum fails. Here both are errors before training. Its
`merge` cannot run, because it asks a list for its keys.

The PEFT export is one LoRA of rank n r with zeros outside the blocks, n times as large as our own
file.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import AdapterLayer, Role
from qlora_lite.adapters.method import AdapterSettings, Footprint, Method
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.lora import kaiming_uniform
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec


class MELoRA(AdapterSettings):
    """Mini ensemble of LoRAs: small block-diagonal pairs give a high rank with few parameters."""

    kind: Literal["melora"] = "melora"

    rank: int = Field(default=1, ge=1)
    """Rank of each mini LoRA; that of the update is `num_blocks` times as high. `ranks` can change
    it per layer."""

    num_blocks: int = Field(default=8, ge=1)
    """Number of mini LoRAs (n). It must divide the inputs and outputs of every layer."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of each mini LoRA."""

    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapter's input."""


def block_diagonal_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Each slice of x through its own pair, (..., d_in) -> (..., d_out).

    Args:
        a: (n, r, d_in / n)
        b: (n, d_out / n, r)
    """
    slices = x.unflatten(-1, (len(a), -1))
    low = torch.einsum("...ni,nri->...nr", slices, a)
    return torch.einsum("...nr,nor->...no", low, b).flatten(-2)


class MELoRALayer(AdapterLayer):
    """y = W x + s blockdiag(B_i A_i) drop(x)"""

    roles: ClassVar[dict[str, Role]] = {"a": Role.DOWN, "b": Role.UP}

    def __init__(
        self, base: FrozenLinear, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base)
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.scale = scale
        self.dropout = dropout

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return block_diagonal_product(x, self.a.to(x.dtype), self.b.to(x.dtype)) * self.scale

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        return torch.block_diag(*self.a.float()), torch.block_diag(*self.b.float()) * self.scale

    def trainable_count(self) -> int:
        rank = self.a.shape[1]
        return rank * (self.base.d_in + self.base.d_out)


class MELoRAMethod(Method[MELoRALayer]):
    """MELoRA layers; nothing happens around a step."""

    settings: MELoRA

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        """The rank of a plan is that of one mini.

        Raises:
            AdapterError: if the blocks do not divide the inputs or the outputs of a layer.
        """
        plans = super().plan(specs)
        num = self.settings.num_blocks
        for spec in specs:
            common = math.gcd(spec.d_in, spec.d_out)
            if spec.path in plans and common % num:
                raise AdapterError(
                    f"adapter.num_blocks={num} does not divide both {spec.d_in} inputs and "
                    f"{spec.d_out} outputs of {spec.path}. Use a divisor of {common}, or leave "
                    f'this layer out: adapter.ranks={{"{spec.path}": 0}}'
                )
        return plans

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        rank = plan.rank
        return Footprint(self.settings.num_blocks * rank, rank * (spec.d_in + spec.d_out))

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> MELoRALayer:
        num = self.settings.num_blocks
        minis = [kaiming_uniform(plan.rank, spec.d_in // num, generator) for _ in range(num)]
        b = torch.zeros(num, spec.d_out // num, plan.rank)
        return MELoRALayer(base, torch.stack(minis), b, plan.scale, self.settings.dropout)
