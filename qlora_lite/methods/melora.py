"""MELoRA: an ensemble of mini LoRAs, each on a slice of its own of inputs and outputs.

    y = W x + s blockdiag(B_1 A_1, ..., B_n A_n) drop(x)

    s = alpha / r,  A_i (r, d_in / n),  B_i (d_out / n, r)

Ren et al. 2024, arXiv:2402.17263: n pairs of rank r make an update of rank n r, from as many
trained numbers as one LoRA of rank r has, r (d_in + d_out). Every A_i starts as LoRA's A does over
its own d_in / n inputs, every B_i at zero: the first output is the base's, bit for bit. The default
numbers are those of the authors' Llama-2-7B script (n = 8, r = 1, alpha = 16, on q_proj and v_proj
at a rate of 3e-4).

Nothing crosses from one slice of the inputs to another slice of the outputs. The slices of k_proj
and v_proj cut through heads unless n divides the number of key-value heads.

Where we deviate: all minis run as one batched product, and have one rank. The released code
(ChasonShi/MELoRA) rounds the slices down: where n does not divide the inputs it drops the last
ones, where it does not divide the outputs the sum fails; here both are an error before the start.
Its `merge` cannot run, since it asks a list for its keys.

As a PEFT adapter it is one LoRA of rank n r whose factors are zero outside the blocks, n times as
large as our own file.
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
    """Mini ensemble of LoRAs: small pairs along the diagonal, for a high rank at a low price."""

    kind: Literal["melora"] = "melora"

    rank: int = Field(default=1, ge=1)
    """Rank of every mini LoRA, of which the update has `num_blocks` times as much; `ranks` may
    change it layer by layer."""

    num_blocks: int = Field(default=8, ge=1)
    """How many mini LoRAs there are (n). It must divide the inputs and outputs of every layer."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of every mini LoRA."""

    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapter's input."""


def block_diagonal_product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(..., d_in) -> (..., d_out), every slice of x through a pair of its own.

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
    """Nothing happens around a step."""

    settings: MELoRA

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        """As every method; the rank is that of one mini.

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
                    f"{spec.d_out} outputs of {spec.path}. Take a divisor of {common}, or leave "
                    f'that layer out: adapter.ranks={{"{spec.path}": 0}}'
                )
        return plans

    def footprint(self, spec: LinearSpec) -> Footprint:
        rank = self.plans[spec.path].rank
        return Footprint(self.settings.num_blocks * rank, rank * (spec.d_in + spec.d_out))

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> MELoRALayer:
        plan, num = self.plans[spec.path], self.settings.num_blocks
        minis = [kaiming_uniform(plan.rank, spec.d_in // num, generator) for _ in range(num)]
        b = torch.zeros(num, spec.d_out // num, plan.rank)
        return MELoRALayer(base, torch.stack(minis), b, plan.scale, self.settings.dropout)
