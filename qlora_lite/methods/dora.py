"""DoRA: weight-decomposed low-rank adaptation.

    y = (m / c) (W + s B A) x,   c = ||W + s B A||        one norm and one m per output

Liu et al. 2024, arXiv:2402.09353, eq. 5; c is treated as a constant in backward (their section
4.3), which saves one (d_out, d_in) gradient. It starts at the base up to rounding, because
m = ||W||. The paper writes column norms of a (d_in, d_out) weight; in torch's layout they are row
norms.

The norm needs neither a dense W + s B A nor a second dequantisation:

    c_i^2 = ||w_i||^2 + 2 s b_i (A w_i) + s^2 b_i (A A^T) b_i

||w_i||^2 is stored, and A W^T is computed in the same product as W x: the rows of A are appended to
those of x. Where the delta nearly cancels w_i, this sum loses its digits (in fp32 it is 4 % off if
1/1000 of the norm is left), and so does W x + s B A x. Rows that lose more than `CANCELS` of the
terms are therefore computed from the dense row in fp64, in forward and in merge alike. There are
usually none, and then nothing is dequantised.

Where we deviate: dropout applies to the input of B A only, the base always gets the full x; PEFT
drops in both. Magnitudes are stored in fp32, since rounding them to bf16 would move the start by
0.2 %. It is exported as a PEFT DoRA adapter; no plain LoRA is lossless.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import Factors, Role
from qlora_lite.adapters.method import AdapterSettings, Footprint, Method
from qlora_lite.adapters.ranks import LayerPlan
from qlora_lite.methods.lora import LoRALayer, fresh_factors
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.targets import LinearSpec

SMALLEST_NORM = 1e-6
"""Lower bound of a row's norm: a row of zeros would be divided by zero."""

CANCELS = 0.25
"""A row is computed exactly if its squared norm is below this share of ||w||^2 + ||s b A||^2. The
cosine of w and the delta is then below -0.75, which chance does not produce in many dimensions;
above it, the squared norm loses at most a factor of 4 in precision."""

EXACT_ROWS = 256
"""Rows that are computed exactly at a time, so that there is no fp64 copy of a whole weight."""


def at_length(direction: Tensor, magnitude: Tensor) -> Tensor:
    """The rows of `direction` (d_out, d_in) scaled to the norms `magnitude` (d_out,)."""
    norms = direction.norm(dim=1).clamp(min=SMALLEST_NORM)
    return (magnitude.to(direction.dtype) / norms)[:, None] * direction


def _parts(rows: Tensor) -> list[Tensor]:
    """`rows` in parts of at most `EXACT_ROWS`; none if it is empty."""
    return [rows[i : i + EXACT_ROWS] for i in range(0, len(rows), EXACT_ROWS)]


class DoRA(AdapterSettings):
    """Weight-decomposed adaptation: a LoRA for the direction, and a trained magnitude per row."""

    kind: Literal["dora"] = "dora"

    rank: int = Field(default=32, ge=1)
    """Rank of the update of the direction; `ranks` can change it per layer."""

    alpha: float = Field(default=64.0, gt=0)
    """Numerator of the scale of the update."""

    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapter's input."""


class DoRALayer(LoRALayer):
    """y = (m / c) (W x + s B A drop(x))"""

    roles: ClassVar[dict[str, Role]] = LoRALayer.roles | {"m": Role.MAGNITUDE}

    squares: Tensor
    """(d_out,): squared norms of the rows of W."""

    def __init__(
        self, base: FrozenLinear, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base, a, b, scale, dropout)
        squares = torch.cat([w.float().square().sum(1) for _, _, w in base.pieces()])
        self.register_buffer("squares", squares, persistent=False)
        self.m = nn.Parameter(squares.sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        if not self.enabled:
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        product = self.base.matmul(torch.cat([rows, self.a.detach().to(x.dtype)]))
        y, a_w = product[: len(rows)], product[len(rows) :].detach()
        norms, cancelled = self._norms(a_w.float())
        gain = (self.m / norms).to(y.dtype)
        update = self.update(x)
        kept = update[..., cancelled] if len(cancelled) else None
        y = y.view(*x.shape[:-1], -1) + update
        del update
        y = gain * y
        if kept is not None:
            y = self._replace_rows(y, x, kept, cancelled)
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    @torch.no_grad()
    def _norms(self, a_w: Tensor) -> tuple[Tensor, Tensor]:
        """c (d_out,) from A W^T (rank, d_out), in fp32, and the rows where it is not precise."""
        a, b = self.a.float(), self.scale * self.b.float()
        cross, delta = 2 * (b * a_w.T).sum(1), ((b @ (a @ a.T)) * b).sum(1)
        squares = self.squares + cross + delta
        cancelled = (squares < CANCELS * (self.squares + delta)).nonzero().squeeze(1)
        return squares.clamp(min=SMALLEST_NORM**2).sqrt(), cancelled

    def _replace_rows(self, y: Tensor, x: Tensor, update: Tensor, rows: Tensor) -> Tensor:
        """`y` (..., d_out) with the outputs `rows` computed from their dense weights.

        Args:
            update: s B A drop(x) of these outputs, (..., rows).
        """
        for start, stop, weight in self.base.pieces():
            inside = ((rows >= start) & (rows < stop)).nonzero().squeeze(1)
            for chosen in _parts(inside):
                part = rows[chosen]
                direction, delta = self._exact_directions(weight[part - start], part)
                norms = direction.detach().norm(dim=1).clamp(min=SMALLEST_NORM)
                gain = self.m[part].double() / norms
                exact = F.linear(x, (gain[:, None] * direction).to(x.dtype))
                if self.training and self.dropout:
                    dropped = update[..., chosen] - F.linear(x, delta.to(x.dtype))
                    exact = exact + gain.to(x.dtype) * dropped
                y = y.index_copy(-1, part, exact.to(y.dtype))
        return y

    def _exact_directions(self, weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """W + s B A and s B A of `rows`, from W of these rows, (rows, d_in) in fp64."""
        delta = self.scale * (self.b[rows].double() @ self.a.double())
        return weight.double() + delta, delta

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        return None

    def delta(self) -> Tensor:
        dense = self.base.dense().float()
        return self.merged(dense) - dense

    @torch.no_grad()
    def merged(self, dense: Tensor) -> Tensor:
        dense = dense.float()
        delta = self.scale * (self.b.float() @ self.a.float())
        direction = dense + delta
        terms = dense.norm(dim=1).square() + delta.norm(dim=1).square()
        cancelled = (direction.norm(dim=1).square() < CANCELS * terms).nonzero().squeeze(1)
        del delta
        merged = at_length(direction, self.m)
        for part in _parts(cancelled):
            exact, _ = self._exact_directions(dense[part], part)
            merged[part] = at_length(exact, self.m[part]).float()
        return merged

    def factors(self, rank: int | None = None) -> Factors | None:
        if rank is not None and rank < self.rank:
            return None
        up = self.scale * self.b.detach().float()
        return Factors(self.a.detach().float(), up, magnitude=self.m.detach().float())

    @torch.no_grad()
    def warm_start(self, factors: Factors) -> None:
        """The same function: magnitudes default to the row norms of the adapted weight."""
        super().warm_start(factors)
        if factors.magnitude is not None:
            self.m.copy_(factors.magnitude)
            return
        learned = (factors.up @ factors.down).to(self.base.device)
        direction = self.base.dense().float() + learned
        self.m.copy_(direction.norm(dim=1))

    def trainable_count(self) -> int:
        return super().trainable_count() + self.base.d_out


class DoRAMethod(Method[DoRALayer]):
    """Nothing happens around a step."""

    def footprint(self, spec: LinearSpec, plan: LayerPlan) -> Footprint:
        lora = super().footprint(spec, plan)
        # backward also needs the output before the gain
        width = lora.width + spec.d_out
        return Footprint(width, lora.trained + spec.d_out, statistics=spec.d_out)

    def build(
        self,
        base: FrozenLinear,
        spec: LinearSpec,
        plan: LayerPlan,
        start: Mapping[str, Tensor] | None,
        generator: torch.Generator,
    ) -> DoRALayer:
        a, b = fresh_factors(spec, plan.rank, generator)
        return DoRALayer(base, a, b, plan.scale, self.settings.dropout)
