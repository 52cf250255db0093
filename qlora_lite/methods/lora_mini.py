"""LoRA-Mini: each factor is split in two, and only the inner halves are trained.

    y = W x + s B_aux B_in A_in A_aux drop(x)          s = alpha / r

    frozen     A_aux (a, d_in) with variance 1/d_in,  B_aux (d_out, b) with variance 1/b
    trained    A_in (r, a),  B_in (b, r):  r (a + b) numbers, whatever the width of the layer

Singh, Aher and Garg 2024, arXiv:2411.15804. Use a higher learning rate than for LoRA, such as 1e-3.
The outer matrices cost the memory and time of a frozen LoRA of rank a: at the default sizes a tenth
of the numbers of a square weight. Smaller sizes (a = b = 64) reduce that too.

Not found: the paper's initialisation, its sizes a and b, and its tables. A public implementation in
the paper's notation starts with both inner matrices at zero, which is a dead point: each gradient
has the other matrix as a factor, so neither ever moves. Our choice: only B_in starts at zero, and
A_in is Kaiming over a, which gives A_in A_aux the variance of LoRA's A. The default sizes train a
twentieth of LoRA's numbers, the best case of the abstract.

Where we deviate: the outer matrices are saved with the adapter. A seed would be smaller, but its
numbers depend on torch's generator, and a reload must not.
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
from qlora_lite.adapters.ranks import LayerPlan, cut_to_weight
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.lora import kaiming_uniform
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

Aux = Literal["gaussian", "orthogonal"]


class LoRAMini(AdapterSettings):
    """LoRA between frozen random matrices: trained parameters do not grow with the width."""

    kind: Literal["lora_mini"] = "lora_mini"

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of the update."""

    inner_down: int | None = Field(default=None, ge=1)
    """Features between A_aux and A_in (a), at most d_in. Default: max(2 r, (d_in + d_out) / 40)."""

    inner_up: int | None = Field(default=None, ge=1)
    """Features between B_in and B_aux (b), at most d_out. Same default."""

    aux: Aux = "gaussian"
    """Frozen outer matrices: independent entries, or orthogonal directions of the same norm."""


def inner_sizes(
    rank: int, d_in: int, d_out: int, down: int | None, up: int | None
) -> tuple[int, int]:
    """a and b of one layer. The default r (a + b) is a twentieth of LoRA's r (d_in + d_out)."""
    default = max(2 * rank, (d_in + d_out) // 40)
    return min(down or default, d_in), min(up or default, d_out)


def outer_matrices(
    d_in: int, d_out: int, a: int, b: int, aux: Aux, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A_aux (a, d_in) and B_aux (d_out, b) in fp32, with mean squares 1/d_in and 1/b."""
    a_aux = torch.randn(d_in, a, generator=generator)
    b_aux = torch.randn(d_out, b, generator=generator)
    if aux == "orthogonal":
        a_aux, b_aux = orthogonal_columns(a_aux), orthogonal_columns(b_aux)
    return a_aux.T.contiguous() / math.sqrt(d_in), b_aux / math.sqrt(b)


def orthogonal_columns(gaussian: Tensor) -> Tensor:
    """Orthogonal columns with the expected norm of the Gaussian ones."""
    q, r = torch.linalg.qr(gaussian)
    # the signs of a QR depend on the LAPACK build; this choice makes it unique
    return q * r.diagonal().sign() * math.sqrt(len(gaussian))


class LoRAMiniLayer(AdapterLayer):
    """y = W x + s B_aux B_in A_in A_aux drop(x)"""

    roles: ClassVar[dict[str, Role]] = {"a_in": Role.DOWN, "b_in": Role.UP}
    frozen: ClassVar[tuple[str, ...]] = ("a_aux", "b_aux")

    a_aux: Tensor
    b_aux: Tensor

    def __init__(
        self,
        base: FrozenLinear,
        a_aux: Tensor,
        a_in: Tensor,
        b_aux: Tensor,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base)
        self.register_buffer("a_aux", a_aux)
        self.register_buffer("b_aux", b_aux)
        self.a_in = nn.Parameter(a_in)
        self.b_in = nn.Parameter(torch.zeros(b_aux.shape[1], a_in.shape[0]))
        self.scale = scale
        self.dropout = dropout

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        for matrix in (self.a_aux, self.a_in, self.b_in, self.b_aux):
            x = F.linear(x, matrix.to(x.dtype))
        return x * self.scale

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        down = self.a_in.float() @ self.a_aux.float()
        return down, self.b_aux.float() @ self.b_in.float() * self.scale

    def trainable_count(self) -> int:
        return self.a_in.shape[0] * (self.a_aux.shape[0] + self.b_aux.shape[1])


class LoRAMiniMethod(Method[LoRAMiniLayer]):
    """LoRA-Mini layers; nothing happens around a step."""

    settings: LoRAMini

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        """Ranks are at most the full rank of the weight.

        Raises:
            AdapterError: if a given inner size is smaller than the rank of a layer.
        """
        plans = cut_to_weight(
            super().plan(specs), specs, self.settings.alpha, self.settings.scaling
        )
        given = {"inner_down": self.settings.inner_down, "inner_up": self.settings.inner_up}
        for path, plan in plans.items():
            for name, size in given.items():
                if size is not None and size < plan.rank:
                    raise AdapterError(
                        f"adapter.{name}={size} is below the rank {plan.rank} of {path} and would "
                        f"limit it. Set adapter.{name}={plan.rank} or more, or a lower rank"
                    )
        return plans

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        """Backward keeps only the inputs of A_in and B_in: the outer matrices are frozen."""
        rank = plan.rank
        a, b = self._inner_sizes(spec, plan)
        return Footprint(a + rank, rank * (a + b), frozen=a * spec.d_in + b * spec.d_out)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> LoRAMiniLayer:
        a, b = self._inner_sizes(spec, plan)
        if start is None:
            aux = self.settings.aux
            a_aux, b_aux = outer_matrices(spec.d_in, spec.d_out, a, b, aux, generator)
        else:
            a_aux, b_aux = start["a_aux"].clone(), start["b_aux"].clone()
        a_in = kaiming_uniform(plan.rank, a, generator)
        return LoRAMiniLayer(base, a_aux, a_in, b_aux, plan.scale, self.settings.dropout)

    def _inner_sizes(self, spec: LinearSpec, plan: LayerPlan) -> tuple[int, int]:
        down, up = self.settings.inner_down, self.settings.inner_up
        return inner_sizes(plan.rank, spec.d_in, spec.d_out, down, up)
