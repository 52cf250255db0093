"""RM-LoRA: LoRA with near-orthonormal factors; every step trains random components of them.

    y = W x + s B A drop(x)

    L = L_task + lambda / N  sum over all N matrices of  ||A A^T - I||_F  or  ||B^T B - I||_F

    from the second step on, in every layer: the gradient of A is zero except in k of its r rows,
    that of B except in k of its r columns;  v1: the same k for both,  v2: k drawn for each

Mao et al. 2024, arXiv:2407.12074: both raise the effective rank of the update. The norms are not
squared. At the start B is zero: its term is sqrt(r) and has no gradient. The penalty pulls the
columns of B towards length 1, so the singular values of the update tend to s: if alpha / r is
large, watch the first hundred steps.

We read the released code (yz-mao/RM-LoRA) in full, but not the text of the paper. The code draws a
mask per layer and step, although its README says per epoch; its first step has none. After the
first step it gives every trained tensor other than A and B a mask of zeros, which freezes the
classifier by accident: here only the factors are masked. The defaults are those of its GLUE script
(r = 8, k = 4, alpha = 32, v2, learning rate 1e-3); its README has r = 4, k = 2, alpha = 16, v1. In
both, k is half the rank.

Where we deviate: gradients are masked before clipping, not after, so the norm includes only what is
used. With Adam a zero gradient does not stop a component: momentum and weight decay still move it.
This is what the released code does and the default here; `strict_mask` restores the components that
were not drawn. 1e-12 is added under the root.
"""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qlora_lite.adapters.method import AdapterSettings, ParameterAccess, StepInfo
from qlora_lite.methods.lora import LoRAMethod

TINY = 1e-12
"""Added under the root so that orthonormal factors have a finite gradient."""


class RMLoRA(AdapterSettings):
    """Regularised and masked LoRA: orthonormal factors, random components trained per step."""

    kind: Literal["rm_lora"] = "rm_lora"

    rank: int = Field(default=8, ge=1)
    """Rank of the update; `ranks` can change it per layer."""

    num_drawn: int | None = Field(default=None, ge=1)
    """Components per layer that a step trains (k). Default: half the rank of the layer."""

    variant: Literal["v1", "v2"] = "v2"
    """v1 draws the same components for A and B, v2 draws them separately."""

    orthogonality: float = Field(default=0.1, ge=0)
    """Weight of the penalty that keeps A and B near orthonormal (lambda)."""

    strict_mask: bool = False
    """Keep components that were not drawn; otherwise momentum and weight decay move them."""

    @model_validator(mode="after")
    def _draws_at_most_all(self) -> Self:
        largest = max(self.rank, *self.ranks.values(), 1)
        if (self.num_drawn or 1) > largest:
            raise ValueError(
                f"num_drawn={self.num_drawn} is above the rank, {largest}. Set "
                f"num_drawn={largest} or less, or a larger rank"
            )
        return self


def distance_from_orthonormal(rows: Tensor) -> Tensor:
    """||M M^T - I||_F of M (rank, features): 0 for orthonormal rows, sqrt(rank) for M = 0."""
    difference = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    return (difference.square().sum() + TINY).sqrt()


def mask_all_but(num: int, rank: int, generator: torch.Generator) -> Tensor:
    """Mask (rank,), false at `num` components drawn without replacement."""
    masked = torch.ones(rank, dtype=torch.bool)
    masked[torch.randperm(rank, generator=generator)[:num]] = False
    return masked


class RMLoRAMethod(LoRAMethod):
    """LoRA layers, a penalty on the factors, and masks on the gradients."""

    settings: RMLoRA

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__(settings)
        self.previous: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        """With `strict_mask`, during the optimizer step: each factor's mask and previous value."""

    def penalty(self) -> Tensor | None:
        if not self.settings.orthogonality:
            return None
        factors = [f.float() for layer in self.layers.values() for f in (layer.a, layer.b.T)]
        distances = [distance_from_orthonormal(rows) for rows in factors]
        return self.settings.orthogonality * torch.stack(distances).mean()

    def before_step(self, access: ParameterAccess, step: StepInfo) -> None:
        if step.step == 0:
            return
        for parameter, masked in self._draw_masks(step.generator):
            gradient = access.gradient(parameter)
            if gradient is not None:  # None for an expert that got no token
                access.set_gradient(parameter, gradient.masked_fill(masked, 0))
            if self.settings.strict_mask:
                self.previous[parameter] = masked, access.read(parameter)

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        previous, self.previous = self.previous, {}
        if step.skipped:
            return
        for parameter, (masked, before) in previous.items():
            access.write(parameter, torch.where(masked, before, access.read(parameter)))

    def _draw_masks(self, generator: torch.Generator) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every factor and the mask of its components without gradient: (rank, 1) or (rank,)."""
        for layer in self.layers.values():
            rank = layer.rank
            num = self.settings.num_drawn or max(rank // 2, 1)
            if num >= rank:
                continue
            rows = mask_all_but(num, rank, generator)
            columns = rows if self.settings.variant == "v1" else mask_all_but(num, rank, generator)
            yield layer.a, rows[:, None].to(layer.base.device)
            yield layer.b, columns.to(layer.base.device)
