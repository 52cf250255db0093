"""Singular values and ranks, compared with dense decompositions and hand-made matrices."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qlora_lite.adapters.layer import AdapterLayer, Role
from qlora_lite.analysis.rank import (
    effective_rank,
    gate_values,
    kept_rank,
    svd_of_dense,
    svd_of_pair,
)
from qlora_lite.methods.lora import LoRA
from tests.workbench import one_layer

FP64 = {"atol": 1e-12, "rtol": 1e-12}
"""Two decompositions in fp64."""
FP32 = {"atol": 1e-5, "rtol": 1e-5}
"""One of them in fp32."""


def pair(d_out, d_in, rank, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw)


@pytest.mark.parametrize(
    ("d_out", "d_in", "rank"), [(33, 48, 4), (48, 33, 1), (20, 50, 20), (6, 9, 8), (5, 40, 12)]
)
def test_a_pair_has_the_singular_values_of_its_dense_product(d_out, d_in, rank):
    down, up = pair(d_out, d_in, rank)
    found = svd_of_pair(down, up)
    expected = np.linalg.svd(up.double().numpy() @ down.double().numpy(), compute_uv=False)
    count = min(d_out, d_in, rank)
    assert len(found.values) == count
    assert_close(found.values, torch.from_numpy(expected[:count].copy()), **FP64)


@pytest.mark.parametrize("shape", [(33, 48, 4), (6, 9, 8)])
def test_the_directions_of_a_pair_are_orthonormal_and_reproduce_the_product(shape):
    down, up = pair(*shape)
    svd = svd_of_pair(down, up)
    eye = torch.eye(len(svd.values), dtype=torch.float64)
    assert_close(svd.left.T @ svd.left, eye, **FP64)
    assert_close(svd.right.T @ svd.right, eye, **FP64)
    product = svd.left * svd.values @ svd.right.T
    assert_close(product, up.double() @ down.double(), **FP64)


def test_the_dense_matrix_of_a_pair_is_never_formed():
    down, up = pair(200_000, 300_000, 2)  # dense it would be 240 GB
    svd = svd_of_pair(down, up)
    gram = (up.double().T @ up.double()) @ (down.double() @ down.double().T)
    assert_close(svd.values.square().sum(), gram.trace(), atol=0, rtol=1e-10)


def test_a_dense_delta_has_the_same_decomposition():
    down, up = pair(30, 20, 5)
    dense, thin = svd_of_dense(up @ down), svd_of_pair(down, up)
    assert_close(dense.values[:5].double(), thin.values, **FP32)
    assert_close(dense.left * dense.values @ dense.right.T, up @ down, **FP32)


def test_n_equal_values_have_effective_rank_n():
    assert effective_rank(torch.full((7,), 0.3)) == pytest.approx(7)


def test_one_value_has_effective_rank_one():
    assert effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)


def test_the_effective_rank_is_that_of_the_values_and_not_of_their_squares():
    # p = (3/4, 1/4): entropy 3/4 ln(4/3) + 1/4 ln 4
    by_hand = math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(by_hand)
    assert effective_rank(torch.tensor([0.03, 0.01])) == pytest.approx(by_hand)


def test_a_zero_delta_has_rank_0():
    down, up = pair(10, 12, 3)
    values = svd_of_pair(down, torch.zeros_like(up)).values
    assert effective_rank(values) == 0
    assert kept_rank(values, (10, 12)) == 0
    assert kept_rank(values[:0], (10, 12)) == 0


def test_zero_components_are_not_kept():
    down, up = pair(40, 60, 6)
    up[:, [1, 4]] = 0
    padded = torch.cat([down, torch.zeros(3, 60)]), torch.cat([up, torch.zeros(40, 3)], 1)
    assert kept_rank(svd_of_pair(*padded).values, (40, 60)) == 4


def test_a_small_component_is_kept():
    down, up = pair(40, 60, 2)
    up[:, 1] *= 1e-6
    assert kept_rank(svd_of_pair(down, up).values, (40, 60)) == 2


def test_the_kept_rank_of_a_dense_matrix_is_numpys():
    down, up = pair(40, 60, 6)
    dense = up @ down
    assert kept_rank(svd_of_dense(dense).values, (40, 60)) == np.linalg.matrix_rank(dense.numpy())


class GatedLayer(AdapterLayer):
    """Two gates of its own."""

    roles = {"a": Role.DOWN, "gate": Role.GATE, "other": Role.GATE}  # noqa: RUF012

    def __init__(self, base):
        super().__init__(base)
        self.a = nn.Parameter(torch.ones(3, base.d_in))
        self.gate = nn.Parameter(torch.tensor([0.5, 0.0, -2.0]))
        self.other = nn.Parameter(torch.tensor([1.0]))


def test_gates_are_found_by_their_role():
    lora = one_layer(LoRA(rank=3), d_out=8, d_in=6)
    assert gate_values(lora) is None
    assert gate_values(GatedLayer(lora.base)).tolist() == [0.5, 0, -2, 1]
