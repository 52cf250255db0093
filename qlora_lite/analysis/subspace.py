"""Subspace similarity of two adapters (phi), and how much a delta amplifies its directions.

    phi(A1, A2, i, j) = ||U1_i^T U2_j||_F^2 / min(i, j)     U_i: the i strongest singular directions
    amplification     = ||dW||_F / ||U^T W V||_F            U, V: those of dW

Hu et al. 2021, arXiv:2106.09685, eq. 4 in section 7.2 and section 7.3 with table 4. phi is 1 if
the smaller subspace lies in the larger one, and 0 if they are orthogonal. The paper uses the right
singular directions of A; for B we use the left ones. A delta that is not a pair has its own left
and right directions.
"""

import math

import torch
from torch import Tensor

from qlora_lite.analysis.norms import delta_norm
from qlora_lite.analysis.rank import kept_rank

KRYLOV_STEPS = 8
_SPARE_PROBES = 8


def right_directions(a: Tensor) -> Tensor:
    """Right singular directions of A (rank, d_in), strongest first, (d_in, n) in fp64. Directions
    with zero singular values are left out."""
    _, values, directions = torch.linalg.svd(a.double(), full_matrices=False)
    kept: Tensor = directions[: kept_rank(values, (a.shape[0], a.shape[1]))]
    return kept.T


def left_directions(b: Tensor) -> Tensor:
    """Left singular directions of B (d_out, rank), strongest first, (d_out, n) in fp64."""
    return right_directions(b.T)


def phi(first: Tensor, second: Tensor, i: int, j: int) -> float:
    """phi of the first i of some directions and the first j of others.

    Args:
        first: (d, n) orthonormal columns, as `right_directions` gives them.
        second: (d, m)
    """
    assert 1 <= i <= first.shape[1], f"{i} of {first.shape[1]} directions"
    assert 1 <= j <= second.shape[1], f"{j} of {second.shape[1]} directions"
    shared = first[:, :i].T.double() @ second[:, :j].double()
    return float(shared.square().sum() / min(i, j))


def phi_grid(first: Tensor, second: Tensor) -> Tensor:
    """phi for every i and j at once: (n, m), with phi(i, j) at [i - 1, j - 1].

    Args:
        first: (d, n) orthonormal columns.
        second: (d, m)
    """
    squares = (first.T.double() @ second.double()).square()
    i = torch.arange(1, squares.shape[0] + 1, device=squares.device)
    j = torch.arange(1, squares.shape[1] + 1, device=squares.device)
    return squares.cumsum(0).cumsum(1) / torch.minimum(i[:, None], j)


def phi_by_chance(i: int, j: int, d: int) -> float:
    """Mean phi of two random subspaces of R^d: E||U_i^T U_j||_F^2 = i j / d."""
    return max(i, j) / d


def projected_norm(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """||U^T W V||_F: norm of a weight projected on some directions (table 4).

    Args:
        weight: (d_out, d_in)
        left: U (d_out, r)
        right: V (d_in, r)
    """
    inside = left.to(weight).T @ weight @ right.to(weight)
    return float(inside.norm())


def projected_norm_by_chance(weight_norm: float, rank: int, shape: tuple[int, int]) -> float:
    """The root mean square of ||U^T W V||_F over random U and V: r ||W||_F / sqrt(d_out d_in)."""
    return rank * weight_norm / math.sqrt(shape[0] * shape[1])


def top_norm(weight: Tensor, rank: int) -> float:
    """||U^T W V||_F where U and V are the top `rank` directions of W (d_out, d_in) itself: the
    maximum over all U and V of this rank.

    By block Krylov iteration (Musco and Musco 2015, arXiv:1504.05477) from a fixed random block: a
    (4096, 4096) weight takes a fraction of a second, its SVD eleven seconds. The value is never
    above the true one; on a random matrix, whose flat spectrum is the hardest case, it was up to
    0.4 % below.
    """
    draws = torch.Generator().manual_seed(0)
    probes = torch.randn(weight.shape[1], min(rank + _SPARE_PROBES, *weight.shape), generator=draws)
    block, basis = weight @ probes.to(weight), []
    for _ in range(KRYLOV_STEPS):
        block = torch.linalg.qr(block).Q
        basis.append(block)
        block = weight @ (weight.T @ block)
    space = torch.linalg.qr(torch.cat(basis, 1)).Q
    return float(torch.linalg.svdvals(space.T @ weight)[:rank].norm())


def amplification(values: Tensor, left: Tensor, right: Tensor, weight: Tensor) -> float:
    """||dW||_F / ||U^T W V||_F: size of the delta relative to the weight in the same directions.

    Args:
        values: all singular values of dW, (n,)
        left: U, its r strongest left directions, (d_out, r)
        right: V, its r strongest right directions, (d_in, r)
        weight: W (d_out, d_in)
    """
    return delta_norm(values) / projected_norm(weight, left, right)
