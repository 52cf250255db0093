"""AdaLoRA: a shrinking budget of singular triplets, kept where they matter.

    y = W x + c P diag(E) Q drop(x)          c = alpha / (r0 + 1e-5), r0 the first rank throughout
    L = L_task + gamma (1 / 2N) sum over N layers of ||Q Q^T - I||_F + ||P^T P - I||_F

Q (r0, d_in) and P (d_out, r0) are named `a` and `b`, E is `e`: it starts at zero, the others
N(0, 0.02^2). Zhang et al. 2023, arXiv:2303.10512. Importance of a number w is smoothed sensitivity
times its smoothed deviation,

    I = |w dL/dw|,   I_ <- b1 I_ + (1 - b1) I,   U_ <- b2 U_ + (1 - b2) |I - I_|,   s(w) = I_ U_

and a triplet's score is that of its E and the means of its row of Q and its column of P. With t
steps done of T, the budget b(t) over all layers decides how many triplets are kept:

    WARM    t <= t_i              all of them, b(t) = b_0
    PRUNE   t_i < t < T - t_f     b_T + (b_0 - b_T)(1 - (t - t_i) / (T - t_i - t_f))^3, rounded
                                  down; every few steps the E of the others is set to zero. They go
                                  on training and may come back
    FIX     t = T - t_f           b_T, and the choice is final: scores are dropped
    FINAL   t > T - t_f           what was not chosen is set to zero after every step

The released code (QingruZhang/AdaLoRA) and PEFT's were read. Their selection zeroes what is at most
as good as a k-th value: too much on ties, and it fails where nothing is to be cut; here it is a
stable top-b. PEFT's example counts t from 0, so that its phases end a step later than here.

Where we deviate: the gradient in I is the one before clipping, while they clip first; w is, as with
them, the value after the step. E rests in fp32 and does not decay, with them it decays like the
rest. The root in the penalty has 1e-12 under it. A run that is extended before its FIX goes on
along the new curve; after it, the choice is made anew only if the new FIX is still to come.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import AdapterLayer, Factors, Role
from qlora_lite.adapters.lora import LoRALayer, LoRAMethod
from qlora_lite.adapters.method import Access, AdapterSettings, Footprint, StepInfo
from qlora_lite.adapters.rm_lora import distance_from_orthonormal
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

START_STD = 0.02
"""Of the entries of P and Q."""


class AdaLoRA(AdapterSettings):
    """Adaptive budget: rank goes to the layers whose triplets matter most."""

    kind: Literal["adalora"] = "adalora"

    rank: int = Field(default=12, ge=1)
    """Triplets of a layer at the start (r0); `ranks` may change it layer by layer."""

    target_rank: int | None = Field(default=None, ge=1)
    """Triplets a layer that are left at the end, on average; two thirds of `rank` unless given."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scale of the update."""

    warmup: int | None = Field(default=None, ge=1)
    """Steps with all triplets (t_i); a tenth of the run unless given."""

    final: int | None = Field(default=None, ge=0)
    """Steps with the final budget (t_f); three tenths of the run unless given."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two cuts; a two-hundredth of the run unless given."""

    sensitivity_decay: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of the sensitivity (beta 1)."""

    deviation_decay: float = Field(default=0.85, gt=0, lt=1)
    """Smoothing of its deviation (beta 2)."""

    orthogonality: float = Field(default=0.1, ge=0)
    """Weight of the penalty on P and Q that are not orthonormal (gamma)."""

    @model_validator(mode="after")
    def _shrinks(self) -> Self:
        if self.final_rank > self.rank:
            raise ValueError(
                f"target_rank={self.target_rank} is above rank={self.rank}. The budget can only "
                f"shrink: take target_rank={self.rank} or less, or a higher rank"
            )
        return self

    @property
    def final_rank(self) -> int:
        return self.target_rank or max(1, round(self.rank * 2 / 3))


# -- the maths -------------------------------------------------------------------------------------


def phases(total: int, warmup: int | None, final: int | None) -> tuple[int, int]:
    """Steps done when the cuts begin (t_i), and when the budget is final (T - t_f).

    Raises:
        AdapterError: if what was asked for leaves no step between them.
    """
    if (warmup or 0) + (final or 0) >= total:
        raise AdapterError(
            f"adapter.warmup={warmup} and adapter.final={final} leave none of the run's {total} "
            "steps for the budget to fall in. Lower them, or leave them out"
        )
    warm = warmup or max(total // 10, 1)
    return warm, max(total - (total * 3 // 10 if final is None else final), warm)


def budget(done: int, warm: int, fixed: int, first: int, last: int) -> int:
    """Triplets that are kept after `done` steps: all, along a cubic curve, the final number."""
    if done >= fixed:
        return last
    if done <= warm:
        return first
    left = 1 - (done - warm) / (fixed - warm)
    return int(last + (first - last) * left**3)


def best(scores: Tensor, num: int) -> Tensor:
    """A mask of exactly the `num` highest scores; of equal ones the first."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:num]] = True
    return kept


@dataclass
class Smoothed:
    """Of every number of a parameter, the smoothed sensitivity and its smoothed deviation."""

    mean: Tensor
    deviation: Tensor

    def observe(self, sensitivity: Tensor, mean_decay: float, deviation_decay: float) -> None:
        """In place; the deviation is that from the new mean."""
        self.mean.lerp_(sensitivity, 1 - mean_decay)
        self.deviation.lerp_((sensitivity - self.mean).abs(), 1 - deviation_decay)

    def score(self) -> Tensor:
        return self.mean * self.deviation


# -- layer -----------------------------------------------------------------------------------------


class AdaLoRALayer(LoRALayer):
    """y = W x + c P diag(E) Q drop(x)"""

    roles: ClassVar[dict[str, Role]] = LoRALayer.roles | {"e": Role.GATE}

    def __init__(
        self, base: FrozenLinear, a: Tensor, b: Tensor, scale: float, dropout: float
    ) -> None:
        super().__init__(base, a, b, scale, dropout)
        self.e = nn.Parameter(torch.zeros(a.shape[0]))

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x, self.a.to(x.dtype)) * self.e.to(x.dtype)
        return F.linear(low, self.b.to(x.dtype)) * self.scale

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        return self.a.float(), self.b.float() * (self.scale * self.e.float())

    def factors(self, rank: int | None = None) -> Factors | None:
        """Triplets whose E is zero are left out."""
        kept = self.e.detach() != 0
        if rank is not None and rank < int(kept.sum()):
            return None
        a, b, e = (t.detach().float() for t in (self.a, self.b, self.e))
        return Factors(a[kept], b[:, kept] * (self.scale * e[kept]))

    def begin_from(self, factors: Factors) -> None:
        super().begin_from(factors)
        self.e.data[: factors.rank] = 1.0

    def trainable_count(self) -> int:
        return super().trainable_count() + self.e.numel()


# -- method ----------------------------------------------------------------------------------------


class AdaLoRAMethod(LoRAMethod):
    """Scores every triplet, and keeps as many as the budget of the step allows."""

    settings: AdaLoRA

    def __init__(self, settings: AdapterSettings) -> None:
        super().__init__(settings)
        self.gradients: dict[str, Tensor] = {}
        """Before clipping, while the optimizer moves."""
        self.smoothed: dict[str, Smoothed] = {}
        """By `path.name`, in fp32; empty when the choice is final."""
        self.kept: dict[str, Tensor] = {}
        """Masks (r0,) of the triplets that the final budget keeps, by path; empty before."""

    def footprint(self, spec: LinearSpec) -> Footprint:
        """Statistics are a gradient, a sensitivity and a deviation for every trained number."""
        lora = super().footprint(spec)
        trained = lora.trained + self.plans[spec.path].rank
        return Footprint(lora.width, trained, statistics=3 * trained)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> AdapterLayer:
        plan, settings = self.plans[spec.path], self.settings
        a = START_STD * torch.randn(plan.rank, spec.d_in, generator=generator)
        b = START_STD * torch.randn(spec.d_out, plan.rank, generator=generator)
        released = settings.alpha / (plan.rank + 1e-5)
        scale = released if settings.scaling == "alpha/r" else plan.scale
        return AdaLoRALayer(base, a, b, scale, settings.dropout)

    def penalty(self) -> Tensor | None:
        if not self.settings.orthogonality:
            return None
        factors = [f.float() for layer in self._layers().values() for f in (layer.a, layer.b.T)]
        distances = [distance_from_orthonormal(rows) for rows in factors]
        return self.settings.orthogonality * torch.stack(distances).mean()

    def begin_step(self, step: StepInfo) -> None:
        self._phases(step.total)  # an error here is before the first forward

    def before_step(self, access: Access, step: StepInfo) -> None:
        if self._is_final(step):
            return
        for key, parameter in self._parameters():
            gradient = access.gradient(parameter)
            if gradient is not None:  # an expert that no token reached
                self.gradients[key] = gradient.clone()

    def after_step(self, access: Access, step: StepInfo) -> None:
        gradients, self.gradients = self.gradients, {}
        if step.skipped:
            return
        (warm, fixed), done = self._phases(step.total), step.step + 1
        if not self._is_final(step):
            self.kept = {}
            self._observe(access, gradients)
        num = budget(done, warm, fixed, *self._budgets())
        if done >= fixed:  # the first step from there on that is not skipped
            self.kept = self.kept or self._select(num)
            self.smoothed = {}
            self._mask(access, self.kept)
        elif done > warm and done % (self.settings.every or max(1, step.total // 200)) == 0:
            self._mask(access, self._select(num))

    def state_dict(self) -> dict[str, Any]:
        found = {f"{path}.kept": mask for path, mask in self.kept.items()}
        for key, smoothed in self.smoothed.items():
            found |= {f"{key}.mean": smoothed.mean, f"{key}.deviation": smoothed.deviation}
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for path, layer in self._layers().items():
            if f"{path}.kept" in state:
                self.kept[path] = state[f"{path}.kept"].to(layer.e.device)
        for key, parameter in self._parameters():
            if f"{key}.mean" in state:
                parts = [state[f"{key}.{part}"] for part in ("mean", "deviation")]
                self.smoothed[key] = Smoothed(*(t.to(parameter.device) for t in parts))

    def _layers(self) -> dict[str, AdaLoRALayer]:
        return {p: layer for p, layer in self.layers.items() if isinstance(layer, AdaLoRALayer)}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, layer in self.layers.items():
            for name, parameter in layer.trained().items():
                yield f"{path}.{name}", parameter

    def _phases(self, total: int) -> tuple[int, int]:
        return phases(total, self.settings.warmup, self.settings.final)

    def _is_final(self, step: StepInfo) -> bool:
        return bool(self.kept) and step.step + 1 >= self._phases(step.total)[1]

    def _budgets(self) -> tuple[int, int]:
        """Triplets at the start and at the end, over all layers."""
        first = sum(self.plans[path].rank for path in self.layers)
        return first, min(self.settings.final_rank * len(self.layers), first)

    def _observe(self, access: Access, gradients: Mapping[str, Tensor]) -> None:
        decays = self.settings.sensitivity_decay, self.settings.deviation_decay
        for key, parameter in self._parameters():
            value = access.read(parameter).float()
            gradient = gradients.get(key)
            seen = torch.zeros_like(value) if gradient is None else (value * gradient).abs()
            fresh = Smoothed(torch.zeros_like(seen), torch.zeros_like(seen))
            self.smoothed.setdefault(key, fresh).observe(seen, *decays)

    def _select(self, num: int) -> dict[str, Tensor]:
        """Masks of the `num` triplets with the highest scores over all layers, by path."""
        scores = {path: self._scores(path) for path in self.layers}
        kept = best(torch.cat(list(scores.values())), num)
        parts = kept.split([len(score) for score in scores.values()])
        return dict(zip(scores, parts, strict=True))

    def _scores(self, path: str) -> Tensor:
        """(r0,): of E, plus the means over the row of Q and the column of P."""
        e, a, b = (self.smoothed[f"{path}.{name}"].score() for name in ("e", "a", "b"))
        return e + a.mean(1) + b.mean(0)

    def _mask(self, access: Access, kept: Mapping[str, Tensor]) -> None:
        for path, layer in self._layers().items():
            access.write(layer.e, access.read(layer.e) * kept[path])
