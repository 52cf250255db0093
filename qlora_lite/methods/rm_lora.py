"""RM-LoRA: LoRA with near-orthonormal factors, of which every step trains a random part.

    y = W x + s B A drop(x)

    L = L_task + lambda / N  sum over all N matrices of  ||A A^T - I||_F  or  ||B^T B - I||_F

    from the second step on, in every layer: the gradient of A is zero outside k of its r rows, that
    of B outside k of its r columns;  v1: the same k for both,  v2: k for each

Mao et al. 2024, arXiv:2407.12074: both raise the effective rank of the update. The norms are not
squared. At the start B is zero: its term is sqrt(r), and has no gradient. The penalty draws the
columns of B to length 1, so singular values of the update tend to s: where alpha / r is large,
watch the first hundred steps.

The released code (yz-mao/RM-LoRA) was read in full, the paper's text was not. It draws a mask per
layer and step, where its README says per epoch; its first step has none. With it every trained
tensor that is neither A nor B gets a mask of zeros after the first step, so that the classifier
is frozen by accident: here only the factors are masked. The defaults are those of its GLUE script
(r = 8, k = 4, alpha = 32, v2, a rate of 1e-3); its README has r = 4, k = 2, alpha = 16, v1: k is
half the rank in both.

Where we deviate: the mask comes before clipping, not after, so that the norm counts what is used.
Under Adam a gradient of zero does not stop a component: momentum and weight decay move it on. That
is the release's way and the default here; `strict_mask` holds the components that were not drawn.
1e-12 stands under the root.
"""

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qlora_lite.adapters.method import AdapterSettings, ParameterAccess, StepInfo
from qlora_lite.methods.lora import LoRAMethod

TINY = 1e-12
"""Under the root, so that orthonormal factors have a gradient."""


class RMLoRA(AdapterSettings):
    """Regularised and masked LoRA: orthonormal factors, a random part of them at a time."""

    kind: Literal["rm_lora"] = "rm_lora"

    rank: int = Field(default=8, ge=1)
    """Rank of the update; `ranks` may change it layer by layer."""

    num_drawn: int | None = Field(default=None, ge=1)
    """Components that a step trains in every layer (k); half of its rank unless given."""

    variant: Literal["v1", "v2"] = "v2"
    """v1 draws the same components for A and B, v2 draws for each."""

    orthogonality: float = Field(default=0.1, ge=0)
    """Weight of the distance of A and B from orthonormal ones (lambda)."""

    strict_mask: bool = False
    """Hold what was not drawn; otherwise momentum and weight decay still move it."""

    @model_validator(mode="after")
    def _draws_at_most_all(self) -> Self:
        largest = max(self.rank, *self.ranks.values(), 1)
        if (self.num_drawn or 1) > largest:
            raise ValueError(
                f"num_drawn={self.num_drawn} is above the rank, {largest}. Take "
                f"num_drawn={largest} or less, or a larger rank"
            )
        return self


def distance_from_orthonormal(rows: Tensor) -> Tensor:
    """||M M^T - I||_F of M (rank, features): 0 for orthonormal rows, sqrt(rank) for M = 0."""
    rest = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    return (rest.square().sum() + TINY).sqrt()


def all_but(num: int, rank: int, generator: torch.Generator) -> Tensor:
    """A mask (rank,), false at `num` components drawn without replacement."""
    rests = torch.ones(rank, dtype=torch.bool)
    rests[torch.randperm(rank, generator=generator)[:num]] = False
    return rests


class RMLoRAMethod(LoRAMethod):
    """LoRA's layers, a penalty on their factors, and masks on the gradients."""

    settings: RMLoRA

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__(settings)
        self.held: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        """Under `strict_mask`, while the optimizer moves: what rests, and its value before."""

    def penalty(self) -> Tensor | None:
        if not self.settings.orthogonality:
            return None
        factors = [f.float() for layer in self.layers.values() for f in (layer.a, layer.b.T)]
        distances = [distance_from_orthonormal(rows) for rows in factors]
        return self.settings.orthogonality * torch.stack(distances).mean()

    def before_step(self, access: ParameterAccess, step: StepInfo) -> None:
        if step.step == 0:
            return
        for parameter, rests in self._draw(step.generator):
            gradient = access.gradient(parameter)
            if gradient is not None:  # an expert that no token reached
                access.set_gradient(parameter, gradient.masked_fill(rests, 0))
            if self.settings.strict_mask:
                self.held[parameter] = rests, access.read(parameter)

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        held, self.held = self.held, {}
        if step.skipped:
            return
        for parameter, (rests, before) in held.items():
            access.write(parameter, torch.where(rests, before, access.read(parameter)))

    def _draw(self, generator: torch.Generator) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every factor with a mask of what rests in this step, (rank, 1) of A and (rank,) of B."""
        for layer in self.layers.values():
            rank = layer.rank
            num = self.settings.num_drawn or max(rank // 2, 1)
            if num >= rank:
                continue
            rows = all_but(num, rank, generator)
            columns = rows if self.settings.variant == "v1" else all_but(num, rank, generator)
            yield layer.a, rows[:, None].to(layer.base.device)
            yield layer.b, columns.to(layer.base.device)
