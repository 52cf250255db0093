"""XGBLoRA: gradient boosting with LoRAs of rank 1 as weak learners.

    y = W x + sum over finished boosters of eta s B_t A_t x  +  s B A drop(x)          s = alpha / r

Every kappa steps the booster is finished and another begins, on decoder layers drawn anew; only
those train. Zhang et al. 2024, arXiv:2410.19694. The loop, rank 1 and eta = 1 are confirmed by
public reviews; kappa, alpha, the rate and the weight of the norm penalty were not found, and no
code of the authors.

Where we deviate: a finished booster is not merged into the weight but kept in a bank (`bank.py`),
since a quantised weight would round it away. A bank above `max_bank_rank` is recompressed to it and
says in `bank_error` what that lost. A booster that the run ends before its time stays the live
pair, not shrunk. The learning rate's schedule goes on; `rewarm` steps of each booster rise to it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from qlora_lite.adapters.method import AdapterSettings, Footprint, Method, ParameterAccess, StepInfo
from qlora_lite.methods.bank import BankedLayer
from qlora_lite.methods.lora import fresh_factors
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec


class XGBLoRA(AdapterSettings):
    """Boosting: many LoRAs of rank 1, one after the other, each on a few layers."""

    kind: Literal["xgblora"] = "xgblora"

    rank: int = Field(default=1, ge=1)
    """Rank of a booster."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of a booster."""

    boost_every: int = Field(default=8, ge=1)
    """Steps that a booster is trained (kappa)."""

    num_layers: int | None = Field(default=None, ge=1)
    """Decoder layers that a booster trains (L_s); a third of them unless given."""

    shrinkage: float = Field(default=1.0, gt=0, le=1)
    """What a finished booster is multiplied by (eta)."""

    norm_penalty: float = Field(default=0.0, ge=0)
    """Weight of ||A||_F^2 + ||B||_F^2 of the live boosters in the loss."""

    rewarm: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises again with each booster."""

    max_bank_rank: int = Field(default=256, ge=1)
    """Rank above which a layer's finished boosters are recompressed."""


class XGBLoRAMethod(Method[BankedLayer]):
    """Draws the layers of a booster, and finishes it when its steps are over."""

    settings: XGBLoRA

    def __init__(self, settings: XGBLoRA) -> None:
        super().__init__(settings)
        self._blocks: list[int] = []
        """Decoder layers of the running booster; -1 stands for what is in none."""
        self._until = 0
        """Steps that are done when it is over; 0 once it is finished."""
        self._block_of: dict[str, int] = {}

    def footprint(self, spec: LinearSpec) -> Footprint:
        rank, cap = self.plans[spec.path].rank, self.settings.max_bank_rank
        size = spec.d_in + spec.d_out
        return Footprint(rank + cap, rank * size, frozen=cap * size)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> BankedLayer:
        plan = self.plans[spec.path]
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
            return  # where the last step was skipped, the next one finishes the booster
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
        """Distinct decoder layers, the same for all processes."""
        there = sorted({self._block_of[path] for path in self.layers})
        count = min(self.settings.num_layers or max(len(there) // 3, 1), len(there))
        order = torch.randperm(len(there), generator=generator)[:count]
        return sorted(there[i] for i in order.tolist())
