"""COLA: a chain of LoRAs, each trained on the residual of the earlier ones.

    y = W x + sum over finished links of s_j B_j A_j x  +  s_k B_k A_k drop(x)      s = alpha / r

    TUNE link k for its share of the steps -> TIE it into the bank -> EXTEND: draw a new A, B = 0,
    clear the optimizer state, restart the learning rate schedule

Xia, Qin and Hazan 2024, arXiv:2401.04151. With one link it is LoRA. We found no code of the
authors; chain length and learning rates are from memory, not checked.

Where we deviate: a finished link is kept in a bank (`bank.py`) instead of being merged, since a
quantised weight would round it away. All links are exported as one LoRA whose rank is the sum of
theirs. The links share the run equally; if a run is extended, its new length is divided again. A
link of smaller rank keeps the shape of the parameters: its unused rows of A are zero, and with B
zero too they never move.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qlora_lite.adapters.method import AdapterSettings, Footprint, Method, ParameterAccess, StepInfo
from qlora_lite.adapters.ranks import LayerPlan, scale_of
from qlora_lite.methods.bank import BankedLayer
from qlora_lite.methods.lora import fresh_factors
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec


class COLA(AdapterSettings):
    """Chain of LoRA: train a LoRA, freeze it, and train another one on top."""

    kind: Literal["cola"] = "cola"

    rank: int = Field(default=8, ge=1)
    """Rank of every link; `ranks` can change it per layer."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of each link."""

    num_links: int = Field(default=3, ge=1)
    """Number of links; they share the steps of the run equally."""

    link_ranks: list[int] = Field(default_factory=list)
    """Ranks of the links, such as `[8, 4, 2]`: not increasing, and at most `rank`. Default: all
    have `rank`."""

    @model_validator(mode="after")
    def _one_falling_rank_per_link(self) -> "COLA":
        ranks = self.link_ranks
        if ranks and len(ranks) != self.num_links:
            raise ValueError(
                f"link_ranks={ranks} has {len(ranks)} ranks for num_links={self.num_links} links. "
                "Give one rank per link, or none"
            )
        if any(r < 1 for r in ranks) or [self.rank, *ranks] != sorted(
            [self.rank, *ranks], reverse=True
        ):
            raise ValueError(
                f"link_ranks={ranks}: ranks must be at least 1, at most rank={self.rank}, and must "
                "not increase. Give a list such as [8, 4, 2]"
            )
        return self

    def rank_of_link(self, link: int, rank: int) -> int:
        """Rank of a link in a layer of rank `rank`."""
        return min(self.link_ranks[link], rank) if self.link_ranks else rank


class COLALayer(BankedLayer):
    """The live link, the finished links, and the number of the live link."""

    links: Tensor
    """(): number of the live link, from 0. It gives a loaded layer its scale."""

    def __init__(self, base: FrozenLinear, a: Tensor, b: Tensor, settings: COLA) -> None:
        self.settings = settings
        super().__init__(base, a, b, 1.0, settings.dropout)
        self.register_buffer("links", torch.zeros((), dtype=torch.int64))
        self._rescale()

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        super().load_state(saved)
        self._rescale()

    def restart_chain(self, fresh: Mapping[str, Tensor]) -> None:
        super().restart_chain(fresh)
        self.links.zero_()
        self._rescale()

    def extend(self, access: ParameterAccess, link: int, generator: torch.Generator) -> None:
        """Finish the live link and start link number `link`."""
        rank = self.settings.rank_of_link(link, self.rank)
        self.finish_link(access, self.fresh_down(generator, rank), cap=None)
        self.links.fill_(link)
        self._rescale()

    def _rescale(self) -> None:
        rank = self.settings.rank_of_link(int(self.links), self.rank)
        self.scale = scale_of(self.settings.alpha, rank, self.settings.scaling)


class COLAMethod(Method[COLALayer]):
    """Finishes a link and starts the next one when its share of the run is over."""

    settings: COLA

    def __init__(self, settings: COLA) -> None:
        super().__init__(settings)
        self._tied = 0
        """Finished steps at the last tie."""

    def plan(self, specs: Sequence[LinearSpec]) -> dict[str, LayerPlan]:
        """Every layer has the rank of its first link, which is the largest."""
        settings = self.settings
        plans = {}
        for path, plan in super().plan(specs).items():
            rank = settings.rank_of_link(0, plan.rank)
            plans[path] = LayerPlan(rank, scale_of(settings.alpha, rank, settings.scaling))
        return plans

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        rank = plan.rank
        links = range(self.settings.num_links - 1)
        finished = sum(self.settings.rank_of_link(link, rank) for link in links)
        size = spec.d_in + spec.d_out
        return Footprint(rank + finished, rank * size, frozen=finished * size)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> COLALayer:
        a, b = fresh_factors(spec, plan.rank, generator)
        return COLALayer(base, a, b, self.settings)

    def schedule_position(self, step: int, total: int) -> tuple[int, int]:
        link = self._link(step, total)
        first, last = (self._first_step(k, total) for k in (link, link + 1))
        return step - first, last - first

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        done = step.step + 1
        if step.skipped or done >= step.total:
            return
        link = self._link(done, step.total)
        if self._first_step(link, step.total) <= self._tied:
            return
        # past the end of the link if that step was skipped, or if it ended a run extended since
        self._tied = done
        for layer in self.layers.values():
            layer.extend(access, link, step.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"tied": self._tied}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tied = state["tied"]

    def _link(self, step: int, total: int) -> int:
        """Number of the link that a step trains."""
        links = range(self.settings.num_links)
        return max(link for link in links if self._first_step(link, total) <= step)

    def _first_step(self, link: int, total: int) -> int:
        return link * total // self.settings.num_links
