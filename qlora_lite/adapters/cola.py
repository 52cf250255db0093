"""COLA: a chain of LoRAs, each trained on what the ones before it left.

    y = W x + sum over finished links of s_j B_j A_j x  +  s_k B_k A_k drop(x)      s = alpha / r

    TUNE link k for its share of the steps -> TIE it into the bank -> EXTEND: A drawn anew, B zero,
    the optimizer's state cleared, the learning rate's schedule from its beginning

Xia, Qin and Hazan 2024, arXiv:2401.04151. With one link it is LoRA. No code of the authors was
found; chain length and learning rates are recalled, not checked.

Where we deviate: a finished link is not merged into the weight but kept in a bank (`bank.py`),
since a quantised weight would round it away; all leave as one LoRA of their ranks together. The
links share the run equally. A link of a smaller rank keeps the parameters' shape: its last rows of
A are zero as B is, and where both are zero nothing ever moves. Its scale is that of its own rank.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qlora_lite.adapters.bank import BankedLayer
from qlora_lite.adapters.layer import AdapterLayer
from qlora_lite.adapters.lora import LoRALayer, LoRAMethod
from qlora_lite.adapters.method import Access, AdapterSettings, Footprint, StepInfo, scale_of
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec


class COLA(AdapterSettings):
    """Chain of LoRA: train a LoRA, keep it, and train another on the rest."""

    kind: Literal["cola"] = "cola"

    rank: int = Field(default=8, ge=1)
    """Rank of every link; `ranks` may change it layer by layer."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of every link."""

    num_links: int = Field(default=3, ge=1)
    """Links of the chain; they share the steps of the run equally."""

    link_ranks: list[int] = Field(default_factory=list)
    """Ranks of the links, from `rank` on and none larger than the one before: `[8, 4, 2]`. All
    have `rank` unless given. Layers of another rank (`ranks`) follow in proportion."""

    @model_validator(mode="after")
    def _one_rank_a_link(self) -> Self:
        ranks = self.link_ranks
        if ranks and len(ranks) != self.num_links:
            raise ValueError(
                f"link_ranks={ranks} has {len(ranks)} ranks for num_links={self.num_links} links. "
                "Give one for each, or none"
            )
        if ranks and (ranks[0] != self.rank or ranks[-1] < 1 or ranks != sorted(ranks)[::-1]):
            raise ValueError(
                f"link_ranks={ranks} must begin with rank={self.rank} and never grow, down to 1 "
                f"at least. Set rank={max(ranks)}, or take other link_ranks"
            )
        return self


def first_step(link: int, total: int, num_links: int) -> int:
    """The step with which a link begins: equal shares, in whole steps."""
    return link * total // num_links


def link_of(step: int, total: int, num_links: int) -> int:
    """The link that a step trains: the last one that has begun."""
    return ((step + 1) * num_links - 1) // total


def rank_of_link(link: int, rank: int, link_ranks: list[int]) -> int:
    """Of a layer whose own rank is `rank`: in proportion to the ranks of the chain."""
    return max(1, round(rank * link_ranks[link] / link_ranks[0])) if link_ranks else rank


class COLALayer(BankedLayer):
    """The live link and the finished ones; the scale goes with the live link's rank."""

    live_scale: Tensor
    """() in fp32: the scale of the live link, for a layer that is loaded."""

    def __init__(
        self, base: FrozenLinear, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base, a, b, scale, dropout)
        self.register_buffer("live_scale", torch.tensor(scale))

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        super().load_state(saved)
        self.scale = self.live_scale.item()

    def extend(self, access: Access, rank: int, scale: float, generator: torch.Generator) -> None:
        """Tie the live link and begin another, of this rank and scale."""
        self.finish_link(access, self.fresh_down(generator, rank))
        self.live_scale.fill_(scale)
        self.scale = scale


class COLAMethod(LoRAMethod):
    """Ends a link and begins the next where its share of the run ends."""

    settings: COLA

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__(settings)
        self.num_finished = 0

    def footprint(self, spec: LinearSpec) -> Footprint:
        """The bank's activation is not kept for the backward: its factors are not trained."""
        rank, size = self.plans[spec.path].rank, spec.d_in + spec.d_out
        links = range(self.settings.num_links - 1)
        finished = sum(rank_of_link(link, rank, self.settings.link_ranks) for link in links)
        return Footprint(rank, rank * size, frozen=finished * size)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> AdapterLayer:
        lora = super().build(base, spec, start, generator)
        assert isinstance(lora, LoRALayer)
        return COLALayer(base, lora.a.data, lora.b.data, lora.scale, lora.dropout)

    def clock(self, step: int, total: int) -> tuple[int, int]:
        """Every link has the whole schedule to itself, warm-up included."""
        num = self.settings.num_links
        link = link_of(step, total, num)
        first, end = first_step(link, total, num), first_step(link + 1, total, num)
        return step - first, end - first

    def after_step(self, access: Access, step: StepInfo) -> None:
        done = step.step + 1
        if step.skipped or done >= step.total:
            return
        link = link_of(done, step.total, self.settings.num_links)
        if link > self.num_finished:  # counted, so that a skipped step only puts it off
            self.num_finished = link
            self._extend(link, access, step.generator)

    def _extend(self, link: int, access: Access, generator: torch.Generator) -> None:
        settings = self.settings
        for path, layer in self.layers.items():
            assert isinstance(layer, COLALayer)
            rank = rank_of_link(link, self.plans[path].rank, settings.link_ranks)
            scale = scale_of(settings.alpha, rank, settings.scaling)
            layer.extend(access, rank, scale, generator)

    def state_dict(self) -> dict[str, Any]:
        return {"num_finished": self.num_finished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_finished = state["num_finished"]
