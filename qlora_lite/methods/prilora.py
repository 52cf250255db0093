"""PRILoRA: ranks that increase with depth, and a regularly pruned A.

    y = W x + s B A drop(x)          s = alpha / r,  r of block l of L blocks, l from 0:

    r = first_rank + (last_rank - first_rank) l / (L - 1)          rounded, halves up

    every step             v = beta v + (1 - beta) u,  u_j = sqrt(mean over the tokens of x_j^2)
    every `prune_every`    in each row i of A the share rho with the lowest |A_ij| v_j becomes zero

Benedek and Wolf 2024, arXiv:2401.11316. Pruned entries still get gradients and can grow again; each
pruning selects from all entries. From 4 to 12 over twelve blocks the ranks are
4 5 5 6 7 8 8 9 10 11 11 12, the budget of rank 8 everywhere.

Known from the abstract and from summaries: the linear ranks and the form of the score. From memory,
not checked: 4 to 12, half of A, 40 steps. Not found: beta, the scale, the end of the pruning, and
any public repository (the ACL Anthology has a software archive of the paper, which we did not
read). Our choices: beta = 0.9; alpha is the same in all layers; u is a root mean square over
tokens, so steps of different sizes count equally; the last pruning is at 90 % of the run. v starts
at zero without bias correction: that is one factor on all of v and does not change the order in a
row.

Where we deviate: Adam's moments of pruned entries are cleared, or they would jump back
(`reset_momentum`). `freeze_mask` keeps the entries of the last pruning at zero to the end. A
pruning due at a step that is skipped because of an overflow is omitted. Every position of a forward
counts as a token, padding too, because a layer cannot distinguish them. The inputs of all processes
are averaged.

All linear layers of a block have the same rank. A layer outside the blocks, or in a model with one
block, gets the middle of the line. A matching pattern of `ranks` takes precedence.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from qlora_lite.adapters.layer import Factors
from qlora_lite.adapters.method import (
    AdapterSettings,
    Footprint,
    Method,
    ParameterAccess,
    StepInfo,
    lora_footprint,
)
from qlora_lite.adapters.ranks import LayerPlan, rank_of, scale_of
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.lora import LoRALayer, fresh_factors
from qlora_lite.model.checkpointing import is_recomputing
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

ACTIVITY = ".activity"
"""Suffix of a layer's v in the method's state."""


class PRILoRA(AdapterSettings):
    """Pruned and rank-increasing LoRA: ranks that rise linearly over the blocks, and a sparse A."""

    kind: Literal["prilora"] = "prilora"

    rank: int = Field(default=8, ge=1)
    """Mean of the ranks, which rise from 0.5 to 1.5 times `rank` unless `first_rank` or `last_rank`
    is given. No effect if both are given."""

    first_rank: int | None = Field(default=None, ge=1)
    """Rank of the first block (r_s)."""

    last_rank: int | None = Field(default=None, ge=1)
    """Rank of the last block (r_f)."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of the update, the same in all layers."""

    prune_share: float = Field(default=0.5, ge=0, lt=1)
    """Share of each row of A that is set to zero (rho)."""

    prune_every: int = Field(default=40, ge=1)
    """Optimizer steps between two prunings."""

    prune_until: float = Field(default=0.9, ge=0, le=1)
    """Share of the run after which nothing is pruned."""

    beta: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the average input size v."""

    freeze_mask: bool = False
    """Keep the entries of the last pruning at zero; otherwise they grow again."""

    reset_momentum: bool = True
    """Clear Adam's moments of pruned entries."""

    @property
    def line(self) -> tuple[int, int]:
        """Ranks of the first and the last block, with mean `rank` unless both are given."""
        first, last = self.first_rank, self.last_rank
        if first is None:
            first = (self.rank + 1) // 2 if last is None else 2 * self.rank - last
        return first, 2 * self.rank - first if last is None else last

    @model_validator(mode="after")
    def _line_is_above_zero(self) -> Self:
        if min(self.line) < 1:
            raise ValueError(
                f"rank={self.rank} as the mean gives ranks from {self.line[0]} to {self.line[1]}, "
                "but ranks must be 1 or more. Set first_rank and last_rank, or a larger rank"
            )
        return self


# -- the maths -------------------------------------------------------------------------------------


def rank_on_line(first: int, last: int, block: int | None, num_blocks: int) -> int:
    """The rank of a block, halves rounded up; the middle without blocks or with only one."""
    is_alone = block is None or num_blocks == 1
    at, length = (1, 2) if is_alone else (block or 0, num_blocks - 1)
    return (2 * (first * length + (last - first) * at) + length) // (2 * length)


def least_important(a: Tensor, activity: Tensor, share: float) -> Tensor:
    """Mask (rank, d_in), true at the floor(share d_in) lowest |a_ij| activity_j of each row."""
    scores = a.abs() * activity
    lowest = scores.topk(int(share * a.shape[1]), dim=1, largest=False).indices
    return torch.zeros_like(a, dtype=torch.bool).scatter_(1, lowest, True)


def is_pruning_due(done: int, total: int, every: int, until: float) -> bool:
    """Whether to prune A after `done` of `total` steps."""
    return done % every == 0 and done / total <= until


def pruning_is_over(done: int, total: int, every: int, until: float) -> bool:
    """Whether A was pruned in the first `done` steps and will not be pruned again."""
    following = (done // every + 1) * every
    return every / total <= until < following / total


# -- layer and method ------------------------------------------------------------------------------


class PRILoRALayer(LoRALayer):
    """LoRA that measures its input.

    Attributes:
        squares: (d_in,) in fp32, the sum of squares of every input feature over the tokens of this
            step; None before the first token.
        num_tokens: number of these tokens.
    """

    squares: Tensor | None = None
    num_tokens: int = 0

    def update(self, x: Tensor) -> Tensor:
        if self.training and not is_recomputing():
            self.observe(x.detach())
        return super().update(x)

    def observe(self, x: Tensor) -> None:
        """Add tokens (..., d_in) to the sums."""
        rows = x.reshape(-1, x.shape[-1])
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()
        self.squares = squares if self.squares is None else self.squares + squares
        self.num_tokens += len(rows)

    def summed_squares(self) -> Tensor:
        """`squares`, or zeros if no token was seen."""
        if self.squares is None:
            return torch.zeros(self.base.d_in, device=self.base.device)
        return self.squares

    def warm_start(self, factors: Factors) -> None:
        if factors.rank > self.rank:
            raise AdapterError(
                f"the adapter to start from has rank {factors.rank}, but this layer has rank "
                f"{self.rank}. Set adapter.first_rank={factors.rank} or more"
            )
        super().warm_start(factors)

    def reset_sums(self) -> None:
        """Set the sums to zero."""
        self.squares, self.num_tokens = None, 0


class PRILoRAMethod(Method[PRILoRALayer]):
    """Plans ranks by block, averages the inputs of every layer, prunes A."""

    settings: PRILoRA

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__(settings)
        self.activity: dict[str, Tensor] = {}
        """v of every layer that got a token, (d_in,) in fp32, by path."""
        self.frozen_masks: dict[nn.Parameter, Tensor] = {}
        """With `freeze_mask`, during the optimizer step: the entries of each A that stay zero."""

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        settings = self.settings
        plans = {}
        for spec in specs:
            on_line = rank_on_line(*settings.line, spec.block, spec.num_blocks)
            rank = rank_of(spec, on_line, settings.ranks)
            if rank > 0:
                scale = scale_of(settings.alpha, rank, settings.scaling)
                plans[spec.path] = LayerPlan(rank, scale)
        return plans

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        """LoRA's, plus v and the sums of squares of a step."""
        lora = lora_footprint(spec.d_in, spec.d_out, plan.rank)
        return Footprint(lora.width, lora.trained, statistics=2 * spec.d_in)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> PRILoRALayer:
        a, b = fresh_factors(spec, plan.rank, generator)
        return PRILoRALayer(base, a, b, plan.scale, self.settings.dropout)

    def begin_step(self, step: StepInfo) -> None:
        for layer in self.layers.values():
            layer.reset_sums()  # drop forwards before the step, such as a memory trial

    def before_step(self, access: ParameterAccess, step: StepInfo) -> None:
        s = self.settings
        if not s.freeze_mask:
            return
        if not pruning_is_over(step.step, step.total, s.prune_every, s.prune_until):
            return
        for layer in self.layers.values():
            pruned = access.read(layer.a) == 0  # from A alone: a resumed run finds the same mask
            self.frozen_masks[layer.a] = pruned
            gradient = access.gradient(layer.a)
            if gradient is not None:  # None for an expert that got no token
                access.set_gradient(layer.a, gradient.masked_fill(pruned, 0))

    def is_settled(self, done: int, total: int) -> bool:
        s = self.settings
        prunes = s.prune_share and is_pruning_due(
            s.prune_every, total, s.prune_every, s.prune_until
        )
        return done >= s.prune_every or not prunes

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        s = self.settings
        masks, self.frozen_masks = self.frozen_masks, {}
        if step.skipped:
            return
        for a, pruned in masks.items():
            access.write(a, access.read(a).masked_fill(pruned, 0))
        self._average_inputs(access)
        if s.prune_share and is_pruning_due(
            step.step + 1, step.total, s.prune_every, s.prune_until
        ):
            for path, activity in self.activity.items():
                self._prune(self.layers[path].a, activity, access)

    def _average_inputs(self, access: ParameterAccess) -> None:
        """Update v with the inputs of this step on all processes.

        Two collective sums for the whole model. A layer without tokens on this process sends zeros,
        because it may have tokens on another one.
        """
        layers, beta = list(self.layers.values()), self.settings.beta
        device = layers[0].base.device
        num_tokens = torch.tensor([layer.num_tokens for layer in layers], device=device)
        squares = torch.cat([layer.summed_squares() for layer in layers])
        counts = access.sum_over_ranks(num_tokens).tolist()
        sums = access.sum_over_ranks(squares).split([layer.base.d_in for layer in layers])
        for path, count, total in zip(self.layers, counts, sums, strict=True):
            if count:  # 0 for an expert that got no token
                size = (total / count).sqrt()
                before = self.activity.get(path, torch.zeros_like(size))
                self.activity[path] = beta * before + (1 - beta) * size

    def _prune(self, a: nn.Parameter, activity: Tensor, access: ParameterAccess) -> None:
        value = access.read(a).float()
        pruned = least_important(value, activity, self.settings.prune_share)
        access.write(a, value.masked_fill(pruned, 0))
        if self.settings.reset_momentum:
            access.reset_optimizer_state(a, pruned)

    def state_dict(self) -> dict[str, Any]:
        return {path + ACTIVITY: activity for path, activity in self.activity.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        found = {name.removesuffix(ACTIVITY): activity for name, activity in state.items()}
        self.activity = {p: v.to(self.layers[p].base.device) for p, v in found.items()}
