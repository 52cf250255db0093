"""PiSSA: start from the principal singular values and vectors of the weight.

    W = U S V^T,   B0 = U_r (S_r / s)^(1/2),   A0 = (S_r / s)^(1/2) V_r^T

so s B0 A0 is the best rank-r approximation of W for every scale s. Meng et al. 2024,
arXiv:2404.02948. The randomised SVD is the paper's fast variant (its `niter`).

Where we deviate: by default the base is unchanged and increments are trained (`offset.py`); the
paper's way is `mode="requantise"`. The factors are computed once and saved, never recomputed,
because the signs of an SVD differ between machines. A rank above the full rank of the weight is
reduced to it.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qlora_lite.foundation.seeds import derive
from qlora_lite.methods.offset import OffsetMethod, OffsetSettings


class PiSSA(OffsetSettings):
    """Principal singular values and vectors: train the largest components of each weight."""

    kind: Literal["pissa"] = "pissa"

    rank: int = Field(default=128, ge=1)
    """Rank of the update, at most that of the weight; `ranks` can change it per layer."""

    alpha: float = Field(default=128.0, gt=0)
    """Numerator of the scale of the update."""

    svd_iterations: int | None = Field(default=None, ge=1)
    """Power iterations of a randomised SVD (4 to 16 in the paper), minutes faster on large weights.
    Default: exact SVD."""


class PiSSAMethod(OffsetMethod):
    """Starts from the principal components."""

    settings: PiSSA

    def factorise(
        self, dense: Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        return principal_factors(dense, rank, scale, self.settings.svd_iterations, generator)


def principal_factors(
    weight: Tensor,
    rank: int,
    scale: float,
    iterations: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A (rank, d_in) and B (d_out, rank), s B A the best rank-r approximation of `weight`; fp32.

    Args:
        iterations: power iterations of a randomised SVD, drawn from `generator`; None: exact SVD.
    """
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = _randomised_svd(weight, rank, iterations, generator)
        vh = v.T
    root = (s[:rank] / scale).sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def _randomised_svd(
    weight: Tensor, rank: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """torch draws the probes from its global generator only, whose state is restored afterwards."""
    devices = [weight.device] if weight.is_cuda else []
    probes = min(rank + 8, *weight.shape)
    with torch.random.fork_rng(devices):
        torch.manual_seed(derive(int(torch.randint(2**31, (), generator=generator)), "svd"))
        u, s, v = torch.svd_lowrank(weight, q=probes, niter=iterations)
    return u, s, v
