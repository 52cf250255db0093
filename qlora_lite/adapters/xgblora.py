"""XGBLoRA: gradient boosting with LoRAs of rank 1 as weak learners.

    y = W x + sum over finished boosters of eta s B_t A_t x  +  s B A drop(x)          s = alpha / r

Every kappa steps the booster is finished and another begins, on decoder layers drawn anew; only
those train. Zhang et al. 2024, arXiv:2410.19694. The loop, rank 1 and eta = 1 are confirmed by
public reviews; kappa, alpha, the rate and the weight of the norm penalty were not found, and no
code of the authors. A third of the layers is near the best of the paper's ablation, 11 of 32.

Where we deviate: a finished booster is not merged into the weight but kept in a bank (`bank.py`),
since a quantised weight would round it away. A bank above `max_bank_rank` is recompressed to it and
says in `bank_error` what that lost. A booster that is not finished when the run ends stays the live
pair, at its full scale. The learning rate's schedule goes on; `rewarm` steps of each booster rise
to it. What is adapted outside the decoder layers (the head) is drawn as if it were one more of
them. Not here: an end by patience, as in a third party's code.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qlora_lite.adapters.bank import BankedLayer
from qlora_lite.adapters.layer import AdapterLayer
from qlora_lite.adapters.lora import LoRALayer, LoRAMethod
from qlora_lite.adapters.method import Access, AdapterSettings, Footprint, LayerPlan, StepInfo
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

OUTSIDE = -1
"""The number of what is adapted outside the decoder layers."""


class XGBLoRA(AdapterSettings):
    """Boosting: many LoRAs of rank 1, one after the other, each on a few layers."""

    kind: Literal["xgblora"] = "xgblora"

    rank: int = Field(default=1, ge=1)
    """Rank of a booster; `ranks` may change it layer by layer."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of a booster."""

    boost_every: int = Field(default=8, ge=1)
    """Steps that a booster is trained (kappa)."""

    num_layers: int | None = Field(default=None, ge=1)
    """Decoder layers that a booster trains (L_s); a third of them unless given."""

    shrinkage: float = Field(default=1.0, gt=0, le=1)
    """What a finished booster is multiplied by (eta)."""

    norm_penalty: float = Field(default=0.0, ge=0)
    """Weight of ||A||_F^2 + ||B||_F^2 of the booster in the loss."""

    rewarm: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises again with each booster."""

    max_bank_rank: int = Field(default=64, ge=1)
    """Rank above which a layer's finished boosters are recompressed."""

    @model_validator(mode="after")
    def _rise_ends(self) -> Self:
        if self.rewarm >= self.boost_every:
            raise ValueError(
                f"rewarm={self.rewarm} does not end before the next booster, boost_every="
                f"{self.boost_every} steps later. Take a rewarm below {self.boost_every}"
            )
        return self


class XGBLoRAMethod(LoRAMethod):
    """Draws the decoder layers of a booster, and finishes it when its steps are over."""

    settings: XGBLoRA

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__(settings)
        self.num_finished = 0
        self.drawn: list[int] = []
        """Decoder layers of the running booster; empty between two."""
        self.block_of: dict[str, int] = {}

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        """As every method.

        Raises:
            AdapterError: if a booster is to train more decoder layers than there are.
        """
        plans = super().plan(specs)
        blocks = {spec.path: OUTSIDE if spec.block is None else spec.block for spec in specs}
        self.block_of = {path: blocks[path] for path in plans}
        num, there = self.settings.num_layers or 1, len(set(self.block_of.values()))
        if num > max(there, 1):
            raise AdapterError(
                f"adapter.num_layers={num}, but adapters are in {there} decoder layers. Take "
                f"adapter.num_layers={there} or less, or widen adapter.targets"
            )
        return plans

    def footprint(self, spec: LinearSpec) -> Footprint:
        """With a full bank: the number of boosters depends on the run's length."""
        rank, size = self.plans[spec.path].rank, spec.d_in + spec.d_out
        return Footprint(rank, rank * size, frozen=self._cap(spec.d_in, spec.d_out) * size)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> AdapterLayer:
        lora = super().build(base, spec, start, generator)
        assert isinstance(lora, LoRALayer)
        return BankedLayer(base, lora.a.data, lora.b.data, lora.scale, lora.dropout)

    def begin_step(self, step: StepInfo) -> None:
        if not self.drawn:
            self.drawn = self._draw(step.generator)

    def active(self, step: StepInfo) -> Iterable[str]:
        return [path for path in self.layers if self.block_of[path] in self.drawn]

    def penalty(self) -> Tensor | None:
        if not self.settings.norm_penalty:
            return None
        live = [p for layer in self.layers.values() for p in layer.trained().values()]
        squares = [p.float().square().sum() for p in live if p.requires_grad]
        return self.settings.norm_penalty * torch.stack(squares).sum()

    def after_step(self, access: Access, step: StepInfo) -> None:
        due = (step.step + 1) // self.settings.boost_every
        if step.skipped or due <= self.num_finished:
            return
        self.num_finished = due  # counted, so that a skipped step only puts it off
        for path in self.active(step):
            layer = self.layers[path]
            assert isinstance(layer, BankedLayer)
            cap = self._cap(layer.base.d_in, layer.base.d_out)
            fresh = layer.fresh_down(step.generator)
            layer.finish_link(access, fresh, shrinkage=self.settings.shrinkage, cap=cap)
        self.drawn = []

    def lr_scale(self, step: int, total: int) -> float:
        """Rises to 1 with every booster but the first, which has the run's own warm-up."""
        every, rewarm = self.settings.boost_every, self.settings.rewarm
        return 1.0 if step < every else min(1.0, (step % every + 1) / (rewarm + 1))

    def state_dict(self) -> dict[str, Any]:
        drawn = torch.tensor(self.drawn, dtype=torch.int64)
        return {"num_finished": self.num_finished, "drawn": drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_finished, self.drawn = state["num_finished"], state["drawn"].tolist()

    def _draw(self, generator: torch.Generator) -> list[int]:
        """Decoder layers without replacement, the same for all processes."""
        there = sorted(set(self.block_of.values()))
        num = self.settings.num_layers or max(round(len(there) / 3), 1)
        order = torch.randperm(len(there), generator=generator)[:num]
        return sorted(there[i] for i in order.tolist())

    def _cap(self, d_in: int, d_out: int) -> int:
        """No product has more than full rank, so a bank above it can lose nothing."""
        return min(self.settings.max_bank_rank, d_in, d_out)
