"""OLoRA: start from an orthonormal basis of the weight.

    W = Q R,   B0 = Q[:, :r],   A0 = R[:r, :]          s B0 A0 is subtracted from W

Buyukakyuz 2024, arXiv:2406.01775, as implemented in PEFT: s is not divided out, and only the start
is orthonormal. The QR is not pivoted, so B0 spans the first r input columns and s B0 A0 is not the
best rank-r approximation. A0 is upper trapezoidal.

Where we deviate: the diagonal of R is made non-negative, because its signs depend on the LAPACK
build. By default the base is unchanged and increments are trained (`offset.py`); the paper's way is
`mode="requantise"`. A rank above the full rank of the weight is reduced to it.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qlora_lite.methods.offset import OffsetMethod, OffsetSettings


class OLoRA(OffsetSettings):
    """Orthonormal low-rank adaptation: the factors start from a QR decomposition."""

    kind: Literal["olora"] = "olora"

    rank: int = Field(default=32, ge=1)
    """Rank of the update, at most that of the weight; `ranks` can change it per layer."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of the update."""

    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapter's input."""


class OLoRAMethod(OffsetMethod):
    """Starts from a QR decomposition."""

    def factorise(
        self, dense: Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return orthonormal_factors(dense, rank)


def orthonormal_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = R[:r] (r, d_in), upper trapezoidal, and B = Q[:, :r] (d_out, r), orthonormal columns."""
    q, r = torch.linalg.qr(weight)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)[:rank]
    return (signs[:, None] * r[:rank]).contiguous(), (q[:, :rank] * signs).contiguous()
