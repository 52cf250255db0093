"""phi and amplification, compared with numpy and with subspaces known by hand."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qlora_lite.analysis.rank import svd_of_pair
from qlora_lite.analysis.subspace import (
    amplification,
    left_directions,
    phi,
    phi_by_chance,
    phi_grid,
    projected_norm,
    projected_norm_by_chance,
    right_directions,
    top_norm,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_phi(a1, a2, i, j):
    """Equation 4, literally."""
    _, _, v1 = np.linalg.svd(a1.double().numpy(), full_matrices=False)
    _, _, v2 = np.linalg.svd(a2.double().numpy(), full_matrices=False)
    return np.linalg.norm(v1[:i] @ v2[:j].T, "fro") ** 2 / min(i, j)


def test_phi_of_an_adapter_with_itself_is_one():
    a = right_directions(random(6, 40))
    assert all(phi(a, a, i, i) == pytest.approx(1) for i in range(1, 7))
    assert phi(a, a, 2, 5) == pytest.approx(1)


def test_phi_of_orthogonal_subspaces_is_zero():
    axes = torch.eye(10)
    first, second = right_directions(axes[:3]), right_directions(axes[3:8])
    assert phi(first, second, 3, 5) == 0


def test_planes_that_share_one_axis_have_phi_one_half():
    axes = torch.eye(4)
    first, second = right_directions(axes[[0, 1]]), right_directions(axes[[1, 2]])
    assert phi(first, second, 2, 2) == pytest.approx(0.5)


def test_phi_of_two_lines_is_the_squared_cosine_of_their_angle():
    angle = torch.tensor(0.7)
    turned = torch.stack([angle.cos(), angle.sin()])[None]
    first, second = right_directions(torch.eye(2)[:1]), right_directions(turned)
    assert phi(first, second, 1, 1) == pytest.approx(float(angle.cos() ** 2))


@pytest.mark.parametrize(("i", "j"), [(1, 1), (1, 16), (4, 4), (8, 3), (8, 16)])
def test_phi_is_equation_4_for_two_ranks(i, j):
    first, second = random(8, 50), random(16, 50, seed=1)
    found = phi(right_directions(first), right_directions(second), i, j)
    assert found == pytest.approx(naive_phi(first, second, i, j), rel=1e-10)


def test_the_left_directions_of_b_are_those_of_its_transpose():
    first, second = random(50, 8), random(50, 4, seed=1)
    found = phi(left_directions(first), left_directions(second), 3, 2)
    assert found == pytest.approx(naive_phi(first.T, second.T, 3, 2), rel=1e-10)


def test_scale_and_mixing_of_the_components_do_not_matter():
    a, mixing = random(5, 30), random(5, 5, seed=2)
    assert phi(right_directions(a), right_directions(7 * mixing @ a), 5, 5) == pytest.approx(1)


def test_the_grid_has_every_pair_of_numbers():
    first, second = right_directions(random(4, 30)), right_directions(random(7, 30, seed=1))
    grid = phi_grid(first, second)
    expected = [[phi(first, second, i, j) for j in range(1, 8)] for i in range(1, 5)]
    assert_close(grid, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_rows_of_zeros_have_no_direction():
    a = random(5, 30)
    a[[1, 3]] = 0
    assert right_directions(a).shape == (30, 3)
    assert right_directions(torch.zeros(5, 30)).shape == (30, 0)


def test_too_many_directions_fail_an_assertion():
    a = right_directions(random(4, 30))
    with pytest.raises(AssertionError, match="5 of 4"):
        phi(a, a, 5, 1)


def test_chance_gives_the_mean_over_random_subspaces():
    draws = [
        phi(right_directions(random(4, 60, seed=n)), right_directions(random(9, 60, seed=-n)), 4, 9)
        for n in range(1, 201)
    ]
    # the mean of 200 draws has a deviation of about 0.002
    assert np.mean(draws) == pytest.approx(phi_by_chance(4, 9, 60), abs=0.01)
    assert phi_by_chance(4, 9, 60) == 9 / 60


def test_amplification_of_a_weights_own_directions_is_a_quotient_of_singular_values():
    # W = diag(5, 4, 3, ...), and a delta of size 2 along its third direction
    weight = torch.diag(torch.tensor([5.0, 4, 3, 2, 1]))
    down, up = torch.eye(5)[2:3], 2 * torch.eye(5)[:, 2:3]
    svd = svd_of_pair(down, up)
    assert projected_norm(weight, svd.left, svd.right) == pytest.approx(3)
    found = amplification(svd.values, svd.left, svd.right, weight)
    assert found == pytest.approx(2 / 3)


def test_amplification_is_that_of_the_paper():
    weight, down, up = random(30, 40), random(6, 40, seed=1), random(30, 6, seed=2)
    dense = (up @ down).double().numpy()
    u, _, v = np.linalg.svd(dense)
    svd = svd_of_pair(down, up)
    for rank in (1, 4, 6):
        there = np.linalg.norm(u[:, :rank].T @ weight.double().numpy() @ v[:rank].T)
        found = amplification(svd.values, svd.left[:, :rank], svd.right[:, :rank], weight)
        assert found == pytest.approx(np.linalg.norm(dense) / there, rel=1e-4)


@pytest.mark.parametrize(("shape", "rank"), [((200, 300), 8), ((300, 100), 1), ((9, 7), 7)])
def test_the_top_norm_of_a_random_weight_is_that_of_its_largest_singular_values(shape, rank):
    weight = random(*shape)
    exact = np.linalg.norm(np.linalg.svd(weight.numpy(), compute_uv=False)[:rank])
    found = top_norm(weight, rank)
    assert found <= exact * (1 + 1e-6)
    # a flat spectrum is the hardest case: 0.4 % were measured on (2048, 2048)
    assert found == pytest.approx(exact, rel=5e-3)


def test_the_top_norm_of_a_falling_spectrum_is_exact():
    u, v = (torch.linalg.qr(random(n, 60, seed=n)).Q for n in (200, 150))
    values = 0.9 ** torch.arange(60.0)
    found = top_norm(u * values @ v.T, 5)
    assert found == pytest.approx(float(values[:5].norm()), rel=1e-5)
    assert found == top_norm(u * values @ v.T, 5)


def test_random_directions_have_the_projected_norm_of_chance():
    weight = random(40, 50)
    squares = [
        projected_norm(
            weight,
            torch.linalg.qr(random(40, 4, seed=n)).Q,
            torch.linalg.qr(random(50, 4, seed=-n)).Q,
        )
        ** 2
        for n in range(1, 301)
    ]
    expected = projected_norm_by_chance(float(weight.norm()), 4, (40, 50))
    assert np.mean(squares) ** 0.5 == pytest.approx(expected, rel=0.05)
