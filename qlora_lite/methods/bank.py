"""A bank of finished factors: the frozen result of the earlier links of a chain of adapters.

    y = W x + sum over finished links of s_k B_k A_k x  +  s B A drop(x)

Merging a finished link into a quantised weight would lose it: a small delta rounds back to the old
weight. So the factors are kept exactly, next to the base. All links are concatenated in one pair of
matrices, so they cost two products whatever their number. The scales multiply the activation
between the two and are never rounded into bf16 factors.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lite.adapters.layer import Factors
from qlora_lite.adapters.method import ParameterAccess, read_rounded
from qlora_lite.methods.lora import LoRALayer, kaiming_uniform
from qlora_lite.model.frozen import FrozenLinear

TINY = 1e-30
"""Avoids 0 / 0 in the relative error of a bank of zeros."""


class BankedLayer(LoRALayer):
    """A live pair of factors that is trained, and the frozen pairs of the finished links."""

    frozen: ClassVar[tuple[str, ...]] = ("bank_down", "bank_up")

    bank_down: Tensor
    """(R, d_in)"""
    bank_up: Tensor
    """(d_out, R)"""
    bank_scales: Tensor
    """(R,)"""
    bank_error: Tensor
    """(): error of all recompressions so far, a sum of relative Frobenius norms."""

    def __init__(
        self, base: FrozenLinear, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base, a, b, scale, dropout)
        self.register_buffer("bank_down", a.new_zeros(0, base.d_in))
        self.register_buffer("bank_up", a.new_zeros(base.d_out, 0))
        self.register_buffer("bank_scales", a.new_zeros(0, dtype=torch.float32))
        self.register_buffer("bank_error", a.new_zeros((), dtype=torch.float32))

    def update(self, x: Tensor) -> Tensor:
        y = super().update(x)
        if not len(self.bank_scales):
            return y
        low = F.linear(x, self.bank_down.to(x.dtype)) * self.bank_scales.to(x.dtype)
        return F.linear(low, self.bank_up.to(x.dtype)) + y

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        """The finished links, then the live pair."""
        down = torch.cat([self.bank_down.float(), self.a.float()])
        finished = self.bank_up.float() * self.bank_scales
        return down, torch.cat([finished, self.b.float() * self.scale], dim=1)

    def factors(self, rank: int | None = None) -> Factors | None:
        """Without zero components: those of a new link, or of a link of smaller rank than A."""
        pair = self.live_factors()
        assert pair is not None
        down, up = (factor.detach() for factor in pair)
        used = down.any(dim=1) & up.any(dim=0)
        if rank is not None and rank < int(used.sum()):
            return None
        return Factors(down[used], up[:, used])

    @torch.no_grad()
    def finish_link(
        self, access: ParameterAccess, fresh: Tensor, cap: int | None, shrinkage: float = 1.0
    ) -> None:
        """Move the live pair into the bank and start a new one with A = `fresh` and B = 0.

        With `shrinkage` 1 the layer computes the same as before, up to the order of sums.

        Args:
            cap: rank above which the bank is recompressed to it; None for never.
        """
        down, up = (read_rounded(access, parameter) for parameter in (self.a, self.b))
        self.deposit(down, up, self.scale * shrinkage)
        if cap is not None and len(self.bank_scales) > cap:
            self.recompress(cap)
        access.write(self.a, fresh.to(down.device))
        access.write(self.b, torch.zeros_like(up))
        for parameter in (self.a, self.b):
            access.reset_optimizer_state(parameter)

    def deposit(self, down: Tensor, up: Tensor, scale: float) -> None:
        """Add a finished pair to the bank, without its zero components."""
        used = (up != 0).any(dim=0) & (down != 0).any(dim=1)
        self.bank_down = torch.cat([self.bank_down, down[used].to(self.bank_down)])
        self.bank_up = torch.cat([self.bank_up, up[:, used].to(self.bank_up)], dim=1)
        scales = torch.full((int(used.sum()),), scale, device=self.bank_scales.device)
        self.bank_scales = torch.cat([self.bank_scales, scales])

    def recompress(self, cap: int) -> None:
        """Replace the bank by its best approximation of rank `cap`.

        The relative error, rounding included, is added to `bank_error`.
        """
        full_down, full_up = self.bank_down.float(), self.bank_up.float() * self.bank_scales
        down, up = best_of_rank(full_down, full_up, cap)
        self.bank_down, self.bank_up = down.to(self.bank_down), up.to(self.bank_up)
        self.bank_scales = torch.ones(len(down), device=self.bank_scales.device)
        error = pair_norm(
            torch.cat([full_down, self.bank_down.float()]),
            torch.cat([full_up, -self.bank_up.float()], dim=1),
        )
        self.bank_error += error / max(pair_norm(full_down, full_up), TINY)

    @torch.no_grad()
    def restart_chain(self, fresh: Mapping[str, Tensor]) -> None:
        """Finish the live pair of the other run too, and start a new one at `fresh`."""
        self.deposit(self.a, self.b, self.scale)
        self.a.copy_(fresh["a"])
        self.b.zero_()

    def warm_start(self, factors: Factors) -> None:
        """The trained pair, of any rank, becomes the first finished link."""
        self.deposit(factors.down, factors.up, 1.0)

    def fresh_down(self, generator: torch.Generator, rank: int | None = None) -> Tensor:
        """A new A in fp32, drawn as in LoRA. Rows from `rank` on are zero and stay zero."""
        a = kaiming_uniform(self.rank, self.base.d_in, generator)
        if rank is not None:
            a[rank:] = 0.0
        return a


def pair_norm(down: Tensor, up: Tensor) -> float:
    """||up @ down||_F from the Gram matrices, in fp64 because two pairs may nearly cancel."""
    down, up = down.double(), up.double()
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt().item()


def best_of_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` pair for up @ down, by QR of both and an SVD of the small core.

    Args:
        down: (R, d_in); up: (d_out, R), fp32.

    Returns:
        (n, d_in) and (d_out, n) with n = min(rank, R, d_in, d_out).
    """
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * (vh[:rank] @ q_down.T), (q_up @ u[:, :rank]) * root
