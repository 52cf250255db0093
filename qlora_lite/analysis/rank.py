"""The effective and numerical rank of a delta, from its singular values.

    delta = U diag(s) V^T          U (d_out, n),  s (n,) descending,  V (d_in, n)

For a pair the dense matrix is never formed. With a QR of both factors,

    up = Q1 R1,   down^T = Q2 R2,   R1 R2^T = U' diag(s) V'^T    ->    U = Q1 U',   V = Q2 V'

so that a (4096, 4096) delta of rank 16 costs an SVD of (16, 16).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.adapters.layer import AdapterLayer, Role


@dataclass(frozen=True)
class SVD:
    """The singular directions of a matrix, strongest first."""

    left: Tensor
    """(d_out, n), orthonormal columns."""
    values: Tensor
    """(n,), descending."""
    right: Tensor
    """(d_in, n), orthonormal columns."""


def svd_of_pair(down: Tensor, up: Tensor) -> SVD:
    """The SVD of `up @ down` from its factors, in fp64, so that zero components stay near zero
    instead of at the rounding of fp32.

    Args:
        down: (rank, d_in)
        up: (d_out, rank)
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return SVD(q_up @ left, values, q_down @ right.T)


def svd_of_dense(delta: Tensor) -> SVD:
    """The SVD of a dense matrix (d_out, d_in), in fp32. 1.9 s for (2048, 2048) on one core."""
    left, values, right = torch.linalg.svd(delta.float(), full_matrices=False)
    return SVD(left, values, right.T)


def effective_rank(values: Tensor) -> float:
    """exp(-sum p_i ln p_i) with p_i = s_i / sum s, of singular values (n,).

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality": between 1
    (one direction) and n (all equal). Uses the values, not their squares. 0 for a zero delta.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(values / total).sum().exp())


def kept_rank(values: Tensor, shape: tuple[int, int]) -> int:
    """Number of singular values (n,) of a matrix (d_out, d_in) above rounding.

    As numpy's `matrix_rank`: above max(shape) * eps * the largest value, with eps of their dtype.
    Pruned components, closed gates and zero padding do not count.
    """
    if not len(values):
        return 0
    floor = max(shape) * torch.finfo(values.dtype).eps * values.max()
    return int((values > floor).sum())


def gate_values(layer: AdapterLayer) -> Tensor | None:
    """All gates of a layer, concatenated, (n,) in fp32; None if it has no gates."""
    gates = [getattr(layer, name) for name, role in layer.roles.items() if role is Role.GATE]
    return torch.cat([gate.detach().float().flatten() for gate in gates]) if gates else None
