"""LoftQ: choose the quantised weight and the start of the factors together.

    L = 0;  T times:  Q = quantise(W - L),  L = best rank-r part of W - dequantise(Q)
    y = Q x + s B A drop(x),   s B A = L at the start

Li et al. 2023, arXiv:2310.08659, algorithm 1; each factor takes the square root of the singular
values. The first output is not that of the quantised base but closer to the unquantised model.
T = 1 guarantees this for every weight; more iterations usually do.

Where we deviate: s is divided out, so the start is right for every alpha (PEFT's is right for
alpha = r only). The base has weights of its own, so only merged weights can be exported. A base
that is hardly quantised (16 bit) has no error to start from and is refused.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qlora_lite.adapters.method import AdapterSettings, Method, Requirement
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.adapters.split_state import require_fit
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.lora import LoRALayer
from qlora_lite.methods.pissa import principal_factors
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

SMALLEST_ERROR = 0.004
"""Smallest relative quantisation error to start from. Of a Gaussian weight, rounding to bf16 gives
0.0016, int8 0.008, four bits 0.09."""


class LoftQ(AdapterSettings):
    """LoRA-fine-tuning-aware quantisation: factors that start at the quantisation error."""

    kind: Literal["loftq"] = "loftq"

    rank: int = Field(default=64, ge=1)
    """Rank of the update and of the approximated quantisation error."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of the update."""

    iterations: int = Field(default=5, ge=1)
    """Iterations of quantising and approximating the error (T)."""

    svd_iterations: int | None = Field(default=None, ge=1)
    """Power iterations of a randomised SVD, minutes faster on large weights. Default: exact SVD."""


class LoftQMethod(Method[LoRALayer]):
    """Finds the start before quantisation; nothing around a step."""

    settings: LoftQ

    @property
    def requires(self) -> Requirement:
        return Requirement.ORIGINAL_WEIGHTS | Requirement.QUANTISATION_ERROR

    def split(
        self,
        spec: LinearSpec,
        plan: LayerPlan,
        dense: Tensor,
        round_trip: Callable[[Tensor], Tensor],
        generator: torch.Generator,
        saved: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        start = dict(saved or self._alternate(spec, plan, dense, round_trip, generator))
        down, up = (start[name].to(dense.device) for name in ("taken_a", "taken_b"))
        require_fit(spec, down, up)
        return dense - plan.scale * (up @ down), start

    def _alternate(
        self,
        spec: LinearSpec,
        plan: LayerPlan,
        dense: Tensor,
        round_trip: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The factors, and those subtracted from the weight before the last quantisation."""
        rank, scale = plan.rank, plan.scale
        a = dense.new_zeros(rank, spec.d_in)
        b = dense.new_zeros(spec.d_out, rank)
        for _ in range(self.settings.iterations):
            taken_a, taken_b = a, b
            error = dense - round_trip(dense - scale * (b @ a))
            _require_error(spec, error, dense)
            found = principal_factors(error, rank, scale, self.settings.svd_iterations, generator)
            a, b = _padded(*found, rank)
        return {"a": a, "b": b, "taken_a": taken_a, "taken_b": taken_b}

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> LoRALayer:
        assert start is not None, f"{spec.path} was loaded without its start"
        a, b = start["a"].clone(), start["b"].clone()
        return LoRALayer(base, a, b, plan.scale, self.settings.dropout)


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Pad with zeros to `rank`: a weight has at most min(d_out, d_in) singular values."""
    missing = rank - a.shape[0]
    pad = torch.nn.functional.pad
    return pad(a, (0, 0, 0, missing)), pad(b, (0, missing))


def _require_error(spec: LinearSpec, error: Tensor, dense: Tensor) -> None:
    relative = (error.norm() / dense.norm()).item()
    if relative < SMALLEST_ERROR:
        raise AdapterError(
            f"adapter=loftq starts at the quantisation error, which is only {relative:.1e} of the "
            f"weight at {spec.path}. Set base.quant=nf4, fp4 or int8, or adapter=lora"
        )
