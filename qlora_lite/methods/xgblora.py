"""XGBLoRA: gradient boosting with LoRAs of rank 1 as weak learners.

    y = W x + sum over finished boosters of eta s B_t A_t x  +  s B A drop(x)          s = alpha / r

Every kappa steps the booster is finished and a new one starts on newly drawn decoder layers; only
those train. Zhang et al. 2024, arXiv:2410.19694. Public reviews confirm the loop, rank 1 and
eta = 1. Kappa, alpha, the learning rate and the weight of the norm penalty were not found, nor any
code of the authors.

Where we deviate: a finished booster is kept in a bank (`bank.py`) instead of being merged, since a
quantised weight would round it away. A bank above `max_bank_rank` is recompressed to it, and
`bank_error` records the loss. If the run ends within a booster, it remains the live pair without
shrinkage. The learning rate schedule continues across boosters; each booster can warm up to it over
`rewarm` steps.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from qlora_lite.adapters.method import AdapterSettings, Footprint, Method, ParameterAccess, StepInfo
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.methods.bank import BankedLayer
from qlora_lite.methods.lora import fresh_factors
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec


class XGBLoRA(AdapterSettings):
    """Gradient boosting: a sequence of LoRAs of rank 1, each on a few decoder layers."""

    kind: Literal["xgblora"] = "xgblora"

    rank: int = Field(default=1, ge=1)
    """Rank of a booster."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of a booster."""

    boost_every: int = Field(default=8, ge=1)
    """Steps per booster (kappa)."""

    num_layers: int | None = Field(default=None, ge=1)
    """Decoder layers that a booster trains (L_s). Default: a third of them."""

    shrinkage: float = Field(default=1.0, gt=0, le=1)
    """Factor on a finished booster (eta)."""

    norm_penalty: float = Field(default=0.0, ge=0)
    """Weight of ||A||_F^2 + ||B||_F^2 of the live booster in the loss."""

    rewarm: int = Field(default=0, ge=0)
    """Warm-up steps of the learning rate for each booster."""

    max_bank_rank: int = Field(default=256, ge=1)
    """Rank above which the finished boosters of a layer are recompressed."""


class XGBLoRAMethod(Method[BankedLayer]):
    """Draws the decoder layers of each booster and finishes it after its steps."""

    settings: XGBLoRA

    def __init__(self, settings: XGBLoRA) -> None:
        super().__init__(settings)
        self._blocks: list[int] = []
        """Decoder layers of the current booster; -1 stands for modules outside the decoder."""
        self._until = 0
        """Finished steps at which the current booster ends; 0 between boosters."""
        self._block_of: dict[str, int] = {}

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        rank, cap = plan.rank, self.settings.max_bank_rank
        size = spec.d_in + spec.d_out
        return Footprint(rank + cap, rank * size, frozen=cap * size)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> BankedLayer:
        a, b = fresh_factors(spec, plan.rank, generator)
        self._block_of[spec.path] = -1 if spec.block is None else spec.block
        return BankedLayer(base, a, b, plan.scale, self.settings.dropout)

    def begin_step(self, step: StepInfo) -> None:
        if not self._until:
            every = self.settings.boost_every
            self._blocks = self._draw(step.generator)
            self._until = (step.step // every + 1) * every

    def active(self, step: StepInfo) -> Iterable[str]:
        return [path for path in self.layers if self._block_of[path] in self._blocks]

    def penalty(self) -> Tensor | None:
        if not self.settings.norm_penalty:
            return None
        live = [p for layer in self.layers.values() for p in layer.trained().values()]
        squares = [p.float().square().sum() for p in live if p.requires_grad]
        return self.settings.norm_penalty * torch.stack(squares).sum()

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        if step.skipped or step.step + 1 < self._until:
            return  # if its last step was skipped, the next step finishes the booster
        for path in self.active(step):
            layer = self.layers[path]
            fresh = layer.fresh_down(step.generator)
            layer.finish_link(access, fresh, self.settings.max_bank_rank, self.settings.shrinkage)
        self._until = 0

    def lr_scale(self, step: int, total: int) -> float:
        if not self.settings.rewarm or step < self.settings.boost_every:
            return 1.0
        return min(1.0, (step % self.settings.boost_every + 1) / (self.settings.rewarm + 1))

    def state_dict(self) -> dict[str, Any]:
        return {"blocks": torch.tensor(self._blocks, dtype=torch.int64), "until": self._until}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._blocks, self._until = state["blocks"].tolist(), state["until"]

    def _draw(self, generator: torch.Generator) -> list[int]:
        """Distinct decoder layers, the same on all processes."""
        blocks = sorted({self._block_of[path] for path in self.layers})
        count = min(self.settings.num_layers or max(len(blocks) // 3, 1), len(blocks))
        order = torch.randperm(len(blocks), generator=generator)[:count]
        return sorted(blocks[i] for i in order.tolist())
