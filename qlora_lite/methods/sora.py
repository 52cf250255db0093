"""SoRA: gates between the factors, which a proximal step drives to exact zeros.

    y = W x + s B diag(g) A drop(x)          s = alpha / r_max
    after each step   g <- sign(g) max(|g| - xi, 0)

Ding et al. 2023, arXiv:2311.11696. A component with a zero gate is left out of the export. It can
return: the gradient of its gate does not vanish, and one update above xi revives it. g starts as
N(0, 1), B at zero.

Where we deviate: the released proximal step (TsinghuaC3I/SoRA) applies its cases one after the
other, so a gate in (xi, 2 xi] is zeroed too. `release_prox` does that; the default is the soft
threshold of the paper. The threshold of the paper is the learning rate times lambda, that of the
released code is a constant: `threshold`, or `threshold_per_lr` times the learning rate of the
gates. The released code also trains layer norms; here that is a setting of every method
(`train_norms`). Gates are stored in fp32, because bf16 cannot represent a shrink of 3e-4 of a
number near 1.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qlora_lite.adapters.method import AdapterSettings, Footprint, Method, ParameterAccess, StepInfo
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.methods.gated import GatedLayer, gated_footprint
from qlora_lite.methods.lora import fresh_factors
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec


class SoRA(AdapterSettings):
    """Sparse low-rank adaptation: an L1 proximal step on gates selects the rank of each layer."""

    kind: Literal["sora"] = "sora"

    rank: int = Field(default=8, ge=1)
    """Largest rank; `ranks` can change it per layer."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of the update; the denominator is always the largest rank."""

    threshold: float | list[float] = 3e-4
    """How much a step shrinks every gate (xi). An increasing list divides the run equally (the
    paper's sparsifying schedule)."""

    threshold_per_lr: float | None = Field(default=None, ge=0)
    """Threshold relative to the learning rate of the gates (lambda), instead of `threshold`."""

    l1: float = Field(default=0.0, ge=0)
    """Weight of mean |g| in the loss, instead of the proximal step (with `threshold=0`)."""

    release_prox: bool = False
    """Use the proximal step of the released code: hard threshold at 2 xi, shrink by xi."""

    @model_validator(mode="after")
    def _thresholds_grow(self) -> "SoRA":
        given = self.threshold if isinstance(self.threshold, list) else [self.threshold]
        if not given or min(given) < 0 or given != sorted(given):
            raise ValueError(
                f"threshold={self.threshold}: thresholds must be 0 or more, and a list must not "
                "decrease. Set a number such as 3e-4, or a list such as [1e-4, 3e-4, 7e-4]"
            )
        return self


def soft_threshold(gate: Tensor, width: float) -> Tensor:
    """Proximal step of the L1 norm: shrink towards zero by `width`, stopping at zero."""
    return gate.sign() * (gate.abs() - width).clamp(min=0)


def released_threshold(gate: Tensor, width: float) -> Tensor:
    """Step of the released code: up to twice `width` becomes zero, larger gates shrink."""
    return torch.where(gate.abs() > 2 * width, soft_threshold(gate, width), 0.0)


class SoRAMethod(Method[GatedLayer]):
    """A proximal step on the gates after every optimizer step."""

    settings: SoRA

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        return gated_footprint(spec.d_in, spec.d_out, plan.rank)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> GatedLayer:
        a, b = fresh_factors(spec, plan.rank, generator)
        gate = torch.randn(plan.rank, generator=generator)
        return GatedLayer(base, a, b, gate, plan.scale, self.settings.dropout)

    def penalty(self) -> Tensor | None:
        if not self.settings.l1:
            return None
        gates = torch.cat([layer.gate for layer in self.layers.values()])
        return self.settings.l1 * gates.abs().mean()

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        width = threshold_at(self.settings, step)
        if step.skipped or not width:
            return
        shrink = released_threshold if self.settings.release_prox else soft_threshold
        for layer in self.layers.values():
            access.write(layer.gate, shrink(access.read(layer.gate), width))


def threshold_at(settings: SoRA, step: StepInfo) -> float:
    """xi of a step: constant, from the list, or proportional to the learning rate."""
    if settings.threshold_per_lr is not None:
        return settings.threshold_per_lr * step.lr * settings.lr_ratio
    if isinstance(settings.threshold, list):
        return settings.threshold[step.step * len(settings.threshold) // step.total]
    return settings.threshold
