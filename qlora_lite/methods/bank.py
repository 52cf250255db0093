"""A bank of finished factors: what a chain of adapters has learned so far, frozen.

    y = W x + sum over finished links of s_k B_k A_k x  +  s B A drop(x)

Merging a finished link into a quantised weight would lose it: a small delta rounds back to where
the weight was. So it is kept beside, exactly. The links lie one after the other in one pair of
matrices, which costs two products whatever their number; scales are applied to the activation
between them and never rounded into bf16 factors.
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
"""So that a bank of zeros has lost nothing."""


class BankedLayer(LoRALayer):
    """A live pair of factors, and the finished ones."""

    frozen: ClassVar[tuple[str, ...]] = ("bank_down", "bank_up")

    bank_down: Tensor
    """(R, d_in)"""
    bank_up: Tensor
    """(d_out, R)"""
    bank_scales: Tensor
    """(R,)"""
    bank_error: Tensor
    """What recompressing has lost so far: a sum of relative Frobenius norms."""

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
        """The finished links, then the live one."""
        down = torch.cat([self.bank_down.float(), self.a.float()])
        finished = self.bank_up.float() * self.bank_scales
        return down, torch.cat([finished, self.b.float() * self.scale], dim=1)

    def factors(self, rank: int | None = None) -> Factors | None:
        """Without the components that are zero: of a link that just began, or is shorter than A."""
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
        """Put the live pair into the bank and begin another: A is `fresh`, B zero.

        The function stays what it was, but for the order of sums, if `shrinkage` is 1.
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
        """Add a finished pair. Components that are zero take no room."""
        used = (up != 0).any(dim=0) & (down != 0).any(dim=1)
        self.bank_down = torch.cat([self.bank_down, down[used].to(self.bank_down)])
        self.bank_up = torch.cat([self.bank_up, up[:, used].to(self.bank_up)], dim=1)
        scales = torch.full((int(used.sum()),), scale, device=self.bank_scales.device)
        self.bank_scales = torch.cat([self.bank_scales, scales])

    def recompress(self, cap: int) -> None:
        """The best bank of rank `cap`, and how much it loses, rounding included, added to
        `bank_error`."""
        whole_down, whole_up = self.bank_down.float(), self.bank_up.float() * self.bank_scales
        down, up = best_of_rank(whole_down, whole_up, cap)
        self.bank_down, self.bank_up = down.to(self.bank_down), up.to(self.bank_up)
        self.bank_scales = torch.ones(len(down), device=self.bank_scales.device)
        lost = pair_norm(
            torch.cat([whole_down, self.bank_down.float()]),
            torch.cat([whole_up, -self.bank_up.float()], dim=1),
        )
        self.bank_error += lost / max(pair_norm(whole_down, whole_up), TINY)

    @torch.no_grad()
    def restart_chain(self, fresh: Mapping[str, Tensor]) -> None:
        """All that the other run learned is finished, its live pair as well."""
        self.deposit(self.a, self.b, self.scale)
        self.a.copy_(fresh["a"])
        self.b.zero_()

    def warm_start(self, factors: Factors) -> None:
        """A trained pair of any rank is the first finished link."""
        self.deposit(factors.down, factors.up, 1.0)

    def fresh_down(self, generator: torch.Generator, rank: int | None = None) -> Tensor:
        """A new A in fp32, drawn as LoRA's; rows from `rank` on are zero and stay so."""
        a = kaiming_uniform(self.rank, self.base.d_in, generator)
        if rank is not None:
            a[rank:] = 0.0
        return a


def pair_norm(down: Tensor, up: Tensor) -> float:
    """||up @ down||_F from the factors' Gram matrices, in fp64: two pairs may nearly cancel."""
    down, up = down.double(), up.double()
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt().item()


def best_of_rank(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` pair for up @ down, by QR of both and an SVD of the small core.

    Args:
        down: (R, d_in); up: (d_out, R), fp32.

    Returns:
        (n, d_in) and (d_out, n), n being `rank` or what there is.
    """
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * (vh[:rank] @ q_down.T), (q_up @ u[:, :rank]) * root
