"""A bank of finished factors: what a chain of adapters has learned so far, frozen.

    y = W x + sum over finished links of s_k B_k A_k x  +  s B A drop(x)

Merging a finished link into a quantised weight would lose it: a small delta rounds back to where
the weight was. So it is kept beside, as exactly as it was trained. The links lie one after the
other in one pair of matrices, which costs two products whatever their number; scales are fp32,
applied to the activation between the two, and never rounded into bf16 factors. A finished link
counts as part of the weight: dropout is on the input of the live pair only.

A bank can be cut to a rank: it becomes its own truncated SVD, from the QRs of both matrices and
the SVD of their small core. What it has lost, rounding included, is added up in `bank_error`.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lite.adapters.layer import Factors
from qlora_lite.adapters.lora import LoRALayer, kaiming_uniform
from qlora_lite.adapters.method import Access
from qlora_lite.model.frozen import FrozenLinear


class BankedLayer(LoRALayer):
    """A live pair of factors, and the finished ones."""

    frozen: ClassVar[tuple[str, ...]] = ("bank_down", "bank_up")

    bank_down: Tensor
    """(R, d_in)"""
    bank_up: Tensor
    """(d_out, R)"""
    bank_scales: Tensor
    """(R,) in fp32"""
    bank_error: Tensor
    """() in fp32: what recompressing has lost so far, a sum of relative Frobenius norms."""

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
        low = F.linear(x, self.bank_down.to(x.dtype)) * self.bank_scales
        return y + F.linear(low.to(x.dtype), self.bank_up.to(x.dtype))

    def live_factors(self) -> tuple[Tensor, Tensor] | None:
        """The finished links, then the live one."""
        down = torch.cat([self.bank_down.float(), self.a.float()])
        finished = self.bank_up.float() * self.bank_scales
        return down, torch.cat([finished, self.b.float() * self.scale], dim=1)

    @torch.no_grad()
    def finish_link(
        self, access: Access, fresh: Tensor, *, shrinkage: float = 1.0, cap: int | None = None
    ) -> None:
        """Put the live pair into the bank and begin another: A is `fresh`, B zero.

        The function stays what it was, but for the order of sums, if `shrinkage` is 1 and the bank
        stays below `cap`.
        """
        # a master in fp32 is rounded to what the forward has seen of it
        down, up = (access.read(p).to(p.dtype) for p in (self.a, self.b))
        self.deposit(down, up, self.scale * shrinkage)
        if cap is not None and len(self.bank_scales) > cap:
            self.recompress(cap)
        access.write(self.a, fresh.to(down.device))
        access.write(self.b, torch.zeros_like(up))
        for parameter in (self.a, self.b):
            access.forget(parameter)

    def deposit(self, down: Tensor, up: Tensor, scale: float) -> None:
        """Add a finished pair. Components that are zero take no room."""
        used = (up != 0).any(dim=0) & (down != 0).any(dim=1)
        scales = self.bank_scales.new_full((int(used.sum()),), scale)
        self.bank_down = torch.cat([self.bank_down, down[used]])
        self.bank_up = torch.cat([self.bank_up, up[:, used]], dim=1)
        self.bank_scales = torch.cat([self.bank_scales, scales])

    def recompress(self, rank: int) -> None:
        """The best bank of this rank, as it will rest; adds what it loses to `bank_error`."""
        down, up = self.bank_down.float(), self.bank_up.float() * self.bank_scales
        u, s, vh = product_svd(down, up)
        self.bank_down, self.bank_up = vh[:rank].to(self.bank_down), u[:, :rank].to(self.bank_up)
        self.bank_scales = s[:rank].contiguous()
        missed = torch.cat([up, -self.bank_up.float() * self.bank_scales], dim=1)
        lost = product_norm(torch.cat([down, self.bank_down.float()]), missed)
        self.bank_error = self.bank_error + lost / s.norm().clamp(min=torch.finfo(s.dtype).tiny)

    def begin_from(self, factors: Factors) -> None:
        """A trained pair of any rank is the first finished link."""
        self.deposit(factors.down.to(self.a), factors.up.to(self.a), 1.0)

    def fresh_down(self, generator: torch.Generator, rank: int | None = None) -> Tensor:
        """A new A in fp32, drawn as LoRA's; rows from `rank` on are zero."""
        a = kaiming_uniform(self.a.shape[0], self.base.d_in, generator)
        if rank is not None:
            a[rank:] = 0.0
        return a


def product_svd(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of up @ down without making it: U (d_out, n), S (n,), V^T (n, d_in).

    Args:
        down: (rank, d_in); up: (d_out, rank). n is the least of the three sizes.
    """
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, vh @ q_down.T


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """The Frobenius norm of up @ down without making it."""
    r_up, r_down = (torch.linalg.qr(factor, mode="r").R for factor in (up, down.T))
    return (r_up @ r_down.T).norm()
