"""Frobenius norms of deltas and of their weights.

Rows are summed in fp32 and the row sums in fp64: with fp32 alone the norm of an (8192, 4096) weight
was 0.2 % too small.
"""

from torch import Tensor


def delta_norm(values: Tensor) -> float:
    """||dW||_F from the singular values (n,) of dW."""
    return float(values.double().norm())


def weight_norm(weight: Tensor) -> float:
    """||W||_F of a weight (d_out, d_in)."""
    return float(weight.float().norm(dim=1).double().norm())


def relative_norm(values: Tensor, weight: Tensor) -> float:
    """||dW||_F / ||W||_F, from the singular values of dW (n,) and W (d_out, d_in)."""
    return delta_norm(values) / weight_norm(weight)
