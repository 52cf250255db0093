"""The numbers of one layer, at the edges that trained adapters do not reach."""

import pytest
import torch

from qlora_lite.adapters.layer import Factors
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.inspection.deltas import Delta
from qlora_lite.inspection.layers import MAX_DIRECTIONS, LoadedLayer, layer_row, phi_row


class InMemory:
    """A target of one layer."""

    target = "memory"

    def __init__(self, rank=3, d_out=8, d_in=10, weight=None, dense=False):
        draws = torch.Generator().manual_seed(rank)
        down = torch.randn(rank, d_in, generator=draws)
        up = torch.randn(d_out, rank, generator=draws)
        pair = None if dense else Factors(down, up)
        noise = 1e-3 * torch.randn(d_out, d_in, generator=draws)
        delta = up @ down + noise if dense else None
        self.delta = Delta((d_out, d_in), rank, pair, delta, weight)

    def read(self, path):
        return self.delta


def load(**options):
    return LoadedLayer.read(InMemory(**options), "q")


def test_a_weight_of_zeros_has_no_relative_norm():
    row = layer_row(load(weight=torch.zeros(8, 10)), "q", is_scaled=True, top=None)
    assert (row.weight_norm, row.relative_norm) == (0, None)
    assert row.amplification.factor is None


def test_a_dense_delta_is_amplified_in_as_many_directions_as_its_rank():
    layer = load(dense=True, weight=torch.ones(8, 10))
    assert layer.kept == 8
    assert layer_row(layer, "q", is_scaled=True, top=None).amplification.rank == 3


def test_an_unscaled_delta_has_relative_singular_values_and_no_norm():
    row = layer_row(load(), "q", is_scaled=False, top=None)
    assert row.singular_values[0] == 1
    assert row.norm is None


def test_phi_has_more_directions_only_on_request():
    shape = {"d_out": 96, "d_in": 100}
    first, second = load(rank=MAX_DIRECTIONS + 8, **shape), load(rank=3, **shape)
    default = phi_row("q", first, second, None, None)
    assert (len(default.right), len(default.right[0])) == (MAX_DIRECTIONS, 3)
    larger = phi_row("q", first, second, MAX_DIRECTIONS + 5, None)
    assert len(larger.right) == MAX_DIRECTIONS + 5
    with pytest.raises(AdapterError, match=r"got 4 directions of memory .* its q has 3"):
        phi_row("q", first, second, None, 4)
