"""AdaLoRA: a shrinking budget of singular triplets, kept where they matter.

    y = W x + c P diag(E) Q drop(x)          c = alpha / (r0 + 1e-5), r0 the first rank throughout
    L = L_task + gamma (1 / 2N) sum over N layers of ||Q Q^T - I||_F + ||P^T P - I||_F

Q (r0, d_in) and P (d_out, r0) are named `a` and `b`, E is `e`. Zhang et al. 2023,
arXiv:2303.10512. The importance of a number w is its smoothed sensitivity times the smoothed
deviation of that sensitivity:

    I = |w dL/dw|,   I_ <- b1 I_ + (1 - b1) I,   U_ <- b2 U_ + (1 - b2) |I - I_|,   s(w) = I_ U_

The score of a triplet is the importance of its E plus the mean importances of its row of Q and its
column of P. After a warm-up the budget falls along a cubic curve from all triplets to `target_rank`
per layer. The triplets with the lowest scores over all layers get E = 0. They can return until the
budget is final.

Where we deviate: I uses the gradient before clipping (PEFT and the released code clip first) and,
like them, the value after the step. The selection is a stable top-b: the k-th value of the released
code zeroes too many on ties and fails when nothing is to be cut. E is stored in fp32 and does not
decay.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qlora_lite.adapters.layer import Role
from qlora_lite.adapters.method import AdapterSettings, Footprint, Method, ParameterAccess, StepInfo
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.methods.gated import GatedLayer, gated_footprint
from qlora_lite.methods.lora import LoRALayer
from qlora_lite.methods.rm_lora import distance_from_orthonormal
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

START_STD = 0.02
"""Standard deviation of the entries of P and Q at the start."""


class AdaLoRA(AdapterSettings):
    """Adaptive rank: the layers whose triplets matter most keep the most."""

    kind: Literal["adalora"] = "adalora"

    rank: int = Field(default=12, ge=1)
    """Triplets per layer at the start (r0); `ranks` can change it per layer."""

    target_rank: int = Field(default=8, ge=1)
    """Average number of triplets per layer at the end."""

    warmup: int | None = Field(default=None, ge=1)
    """Steps with all triplets (t_i). Default: a tenth of the run."""

    final: int | None = Field(default=None, ge=0)
    """Steps with the final budget (t_f). Default: three tenths of the run."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two cuts. Default: a two-hundredth of the run."""

    sensitivity_decay: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the averaged sensitivity (beta 1)."""

    deviation_decay: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the averaged deviation of the sensitivity (beta 2)."""

    orthogonality: float = Field(default=0.1, ge=0)
    """Weight of the penalty that keeps P and Q near orthonormal (gamma)."""

    @model_validator(mode="after")
    def _shrinks(self) -> "AdaLoRA":
        if self.target_rank > self.rank:
            raise ValueError(
                f"target_rank={self.target_rank} is above rank={self.rank}, but the budget can "
                f"only shrink. Set target_rank={self.rank} or less, or a higher rank"
            )
        return self


class AdaLoRALayer(GatedLayer):
    """y = W x + c P diag(E) Q drop(x)"""

    roles: ClassVar[dict[str, Role]] = LoRALayer.roles | {"e": Role.GATE}
    gate_name: ClassVar[str] = "e"


class AdaLoRAMethod(Method[AdaLoRALayer]):
    """Scores every triplet and keeps as many as the current budget allows."""

    settings: AdaLoRA

    def __init__(self, settings: AdaLoRA) -> None:
        super().__init__(settings)
        self._gradients: dict[str, Tensor] = {}
        self._sensitivity: dict[str, Tensor] = {}
        self._deviation: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        """Masks of the triplets of the final budget, by path; empty until then."""

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        gated = gated_footprint(spec.d_in, spec.d_out, plan.rank)
        return replace(gated, statistics=3 * gated.trained)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> AdaLoRALayer:
        a = START_STD * torch.randn(plan.rank, spec.d_in, generator=generator)
        b = START_STD * torch.randn(spec.d_out, plan.rank, generator=generator)
        scale = plan.scale
        if self.settings.scaling == "alpha/r":
            scale = self.settings.alpha / (plan.rank + 1e-5)
        return AdaLoRALayer(base, a, b, torch.zeros(plan.rank), scale, self.settings.dropout)

    def penalty(self) -> Tensor | None:
        if not self.settings.orthogonality:
            return None
        errors = []
        for layer in self.layers.values():
            errors += [
                distance_from_orthonormal(layer.a.float()),
                distance_from_orthonormal(layer.b.float().T),
            ]
        return self.settings.orthogonality * torch.stack(errors).mean()

    def before_step(self, access: ParameterAccess, step: StepInfo) -> None:
        if self._kept and step.step + 1 >= self._phases(step.total)[1]:
            return
        for path, layer in self.layers.items():
            for name, parameter in layer.trained().items():
                gradient = access.gradient(parameter)
                if gradient is None:  # an expert that got no token
                    gradient = torch.zeros_like(access.read(parameter))
                self._gradients[f"{path}.{name}"] = gradient.clone()

    def after_step(self, access: ParameterAccess, step: StepInfo) -> None:
        gradients, self._gradients = self._gradients, {}
        if step.skipped:
            return
        warm, fixed = self._phases(step.total)
        done = step.step + 1
        if done < fixed:
            self._kept = {}  # the run was extended: its budget is no longer final
        if not self._kept:
            self._observe(access, gradients)
        every = self.settings.every or max(1, step.total // 200)
        if done >= fixed and not self._kept:  # `done` is larger if that step was skipped
            self._kept = self._select(budget(done, warm, fixed, *self._budgets()))
            self._sensitivity, self._deviation = {}, {}
        if done >= fixed:
            self._mask(access, self._kept)
        elif done > warm and done % every == 0:
            self._mask(access, self._select(budget(done, warm, fixed, *self._budgets())))

    def is_settled(self, done: int, total: int) -> bool:
        return done >= self._phases(total)[1] and bool(self._kept)

    def state_dict(self) -> dict[str, Any]:
        parts = {"sensitivity": self._sensitivity, "deviation": self._deviation, "kept": self._kept}
        return {
            f"{part}:{name}": t for part, tensors in parts.items() for name, t in tensors.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = next(iter(self.layers.values())).base.device
        parts = {"sensitivity": self._sensitivity, "deviation": self._deviation, "kept": self._kept}
        for key, tensor in state.items():
            part, _, name = key.partition(":")
            parts[part][name] = tensor.to(device)

    def _phases(self, total: int) -> tuple[int, int]:
        """Finished steps after which cuts start, and after which the budget is final."""
        warm = min(self.settings.warmup or max(total // 10, 1), total)
        final = total * 3 // 10 if self.settings.final is None else self.settings.final
        return warm, max(total - final, warm)

    def _budgets(self) -> tuple[int, int]:
        """Number of triplets of all layers at the start and at the end."""
        ranks = [layer.rank for layer in self.layers.values()]
        return sum(ranks), min(self.settings.target_rank * len(ranks), sum(ranks))

    def _observe(self, access: ParameterAccess, gradients: Mapping[str, Tensor]) -> None:
        """Update the averages of sensitivity and deviation of every number, in fp32."""
        s = self.settings
        for path, layer in self.layers.items():
            for name, parameter in layer.trained().items():
                key = f"{path}.{name}"
                now = (access.read(parameter).float() * gradients[key].float()).abs()
                sensitivity = self._sensitivity.setdefault(key, torch.zeros_like(now))
                sensitivity.mul_(s.sensitivity_decay).add_(now, alpha=1 - s.sensitivity_decay)
                difference = (now - sensitivity).abs()
                deviation = self._deviation.setdefault(key, torch.zeros_like(now))
                deviation.mul_(s.deviation_decay).add_(difference, alpha=1 - s.deviation_decay)

    def _select(self, count: int) -> dict[str, Tensor]:
        """Masks of the `count` triplets with the highest scores over all layers, by path."""
        scores = {path: self._scores(path) for path in self.layers}
        order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
        kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        kept[order[:count]] = True
        parts = kept.split([len(score) for score in scores.values()])
        return dict(zip(scores, parts, strict=True))

    def _scores(self, path: str) -> Tensor:
        """(r0,): importance of E, plus the means over the row of Q and over the column of P."""
        e, a, b = (
            self._sensitivity[f"{path}.{name}"] * self._deviation[f"{path}.{name}"]
            for name in ("e", "a", "b")
        )
        return e + a.mean(1) + b.mean(0)

    def _mask(self, access: ParameterAccess, kept: Mapping[str, Tensor]) -> None:
        for path, layer in self.layers.items():
            access.write(layer.gate, access.read(layer.gate) * kept[path])


def budget(done: int, warm: int, fixed: int, first: int, last: int) -> int:
    """Triplets to keep after `done` steps: `first`, then a cubic curve, then `last`."""
    if done >= fixed:
        return last
    if done <= warm:
        return first
    left = 1 - (done - warm) / (fixed - warm)
    return int(last + (first - last) * left**3)
