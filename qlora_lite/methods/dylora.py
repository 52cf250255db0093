"""DyLoRA: one LoRA whose first b components are a good LoRA of rank b, for every b.

    y = W x + s_b B[:, :b] A[:b] drop(x)          s_b = alpha / b

    training step      b drawn from min_rank .. rank, one for the whole model
    evaluation         b = eval_rank

Valipour et al. 2022, arXiv:2210.07558. A (rank, d_in) and B (d_out, rank) start as in LoRA. One
run gives an adapter of every rank: `factors(b)` is lossless at rank b. There are two variants:

    standard    A[:b] and B[:, :b] are trained
    frozen      all b components are used, only the last one is trained: row b of A, column b of B

The released code (huawei-noah/Efficient-NLP) counts ranks from 0 and multiplies each truncated
factor by sqrt(r / b) and the product by alpha / r, which is the same alpha / b. Its GLUE script
trains the frozen variant with rank 8 and alpha 16; these numbers are the defaults here. Its
prediction loop over the ranks never sets the rank, so all its test files are of the last one.

Where we deviate: in the frozen variant the released code only detaches the earlier components, so
momentum and weight decay still move them (and the later ones). Here every component but the drawn
one is restored after the step, to the bit. Adam's moments of a component decay while others are
drawn. In the standard variant the components above b still move by their momentum, as in the
released code. The geometric distribution of the paper's ablation was not found in code: ours is
truncated to the range, and its p is our choice.

A layer whose own rank (`ranks`) is below the drawn one uses all its components.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import Factors
from qlora_lite.adapters.method import AdapterSettings, Method, ParameterAccess, StepInfo
from qlora_lite.adapters.ranks import LayerPlan, scale_of
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.lora import LoRALayer, fresh_factors
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

Distribution = Literal["uniform", "geometric"]


class DyLoRA(AdapterSettings):
    """Dynamic LoRA: one run gives an adapter of every rank up to the largest."""

    kind: Literal["dylora"] = "dylora"

    rank: int = Field(default=8, ge=1)
    """Largest rank (r_max); `ranks` can change it per layer."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale: alpha/b at rank b."""

    min_rank: int = Field(default=1, ge=1)
    """Smallest rank drawn in training."""

    variant: Literal["standard", "frozen"] = "standard"
    """What a step at rank b trains: the first b components, or only the b-th."""

    distribution: Distribution = "uniform"
    """Distribution of the drawn rank; the geometric one prefers small ranks."""

    p: float = Field(default=0.25, gt=0, lt=1)
    """Geometric distribution: each rank is 1 - p times as likely as the next smaller one."""

    eval_rank: int | None = Field(default=None, ge=1)
    """Rank of evaluation, merge and export. Default: the largest."""

    @model_validator(mode="after")
    def _ranks_are_in_range(self) -> Self:
        largest = max(self.rank, *self.ranks.values(), 1)
        for name, rank in (("min_rank", self.min_rank), ("eval_rank", self.eval_rank or 1)):
            if rank > largest:
                raise ValueError(
                    f"{name}={rank} is above the largest rank, {largest}. Set {name}={largest} or "
                    "less, or a larger rank"
                )
        return self


# -- the maths -------------------------------------------------------------------------------------


def rank_probabilities(low: int, high: int, distribution: Distribution, p: float) -> Tensor:
    """Probability of each rank low..high, (high - low + 1,)."""
    above = torch.arange(high - low + 1, dtype=torch.float64)
    weights = torch.ones_like(above) if distribution == "uniform" else (1 - p) ** above
    return weights / weights.sum()


def detach_all_but_last(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same pair, (rank, d_in) and (d_out, rank), with gradients for the last component only."""
    return (
        torch.cat([a[:-1].detach(), a[-1:]]),
        torch.cat([b[:, :-1].detach(), b[:, -1:]], dim=1),
    )


# -- layer and method ------------------------------------------------------------------------------


class DyLoRALayer(LoRALayer):
    """y = W x + s_b B[:, :b] A[:b] drop(x), with b the drawn rank, or `eval_rank` in evaluation.

    Args:
        scales: s_b of every rank from 1 to the largest.
        eval_rank: rank of everything except the forward in training.
        last_only: train only the b-th component.
    """

    def __init__(
        self,
        base: FrozenLinear,
        a: Tensor,
        b: Tensor,
        scales: Sequence[float],
        eval_rank: int,
        last_only: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(base, a, b, scales[eval_rank - 1], dropout)
        self.scales = tuple(scales)
        self.eval_rank = eval_rank
        self.last_only = last_only
        self.drawn = self.rank
        """Rank of the forward in training; the largest before the first draw (most memory)."""

    def update(self, x: Tensor) -> Tensor:
        rank = self.drawn if self.training else self.eval_rank
        a, b = self.a[:rank], self.b[:, :rank]
        if self.training and self.last_only:
            a, b = detach_all_but_last(a, b)
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * self.scales[rank - 1]

    def live_factors(self) -> tuple[Tensor, Tensor]:
        return self._pair(self.eval_rank)

    def factors(self, rank: int | None = None) -> Factors:
        """The pair at any rank; above the largest rank, the largest."""
        down, up = self._pair(self.eval_rank if rank is None else min(rank, self.rank))
        return Factors(down.detach(), up.detach())

    def _pair(self, rank: int) -> tuple[Tensor, Tensor]:
        return self.a[:rank].float(), self.b[:, :rank].float() * self.scales[rank - 1]

    def warm_start(self, factors: Factors) -> None:
        """The pair is exact at `eval_rank`; at lower ranks it is truncated and rescaled."""
        if factors.rank > self.eval_rank:
            raise AdapterError(
                f"the adapter to start from has rank {factors.rank}, but this layer is evaluated "
                f"at rank {self.eval_rank}. Set adapter.rank={factors.rank} or more, and the same "
                "adapter.eval_rank if one is given"
            )
        super().warm_start(factors)


class DyLoRAMethod(Method[DyLoRALayer]):
    """Draws the rank of every step; the frozen variant restores the components not drawn."""

    settings: DyLoRA

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__(settings)
        self.before: dict[nn.Parameter, Tensor] = {}
        """Frozen variant: the values before the optimizer step."""

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> DyLoRALayer:
        settings, rank = self.settings, plan.rank
        a, b = fresh_factors(spec, rank, generator)
        return DyLoRALayer(
            base,
            a,
            b,
            [scale_of(settings.alpha, b, settings.scaling) for b in range(1, rank + 1)],
            min(settings.eval_rank or rank, rank),
            settings.variant == "frozen",
            settings.dropout,
        )

    def begin_step(self, step: StepInfo) -> None:
        layers, settings = self.layers.values(), self.settings
        high = max(layer.rank for layer in layers)
        low = min(settings.min_rank, high)
        probabilities = rank_probabilities(low, high, settings.distribution, settings.p)
        rank = low + int(torch.multinomial(probabilities, 1, generator=step.generator))
        for layer in layers:
            layer.drawn = min(rank, layer.rank)

    def before_step(self, access: ParameterAccess, step: StepInfo) -> None:
        if self.settings.variant == "frozen":
            layers = self.layers.values()
            self.before = {p: access.read(p) for layer in layers for p in (layer.a, layer.b)}

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        before, self.before = self.before, {}
        if step.skipped or not before:
            return
        for layer in self.layers.values():
            a, b, drawn = before[layer.a], before[layer.b], layer.drawn - 1
            a[drawn] = access.read(layer.a)[drawn]
            b[:, drawn] = access.read(layer.b)[:, drawn]
            access.write(layer.a, a)
            access.write(layer.b, b)
