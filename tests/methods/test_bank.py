"""The bank of finished links: finishing a link does not change what the layer computes."""

import pytest
import torch

from qlora_lite.adapters.layer import Factors
from qlora_lite.methods.bank import best_of_rank, pair_norm
from qlora_lite.methods.cola import COLA
from tests.methods.access import PlainAccess
from tests.workbench import CLOSE, one_layer, perturb


def layer_with(num_links, **settings):
    """A layer with finished links, the sum of their deltas, and the access that was used."""
    layer = one_layer(COLA(rank=3, alpha=4.5, dropout=0.0, **settings), 33, 57)
    access, total = PlainAccess(), torch.zeros(33, 57)
    for link in range(num_links):
        perturb(layer, size=0.3, seed=link)
        total += layer.scale * (layer.b @ layer.a).detach()
        fresh = layer.fresh_down(torch.Generator().manual_seed(link))
        layer.finish_link(access, fresh, cap=None)
    return layer, total, access


def test_finishing_a_link_does_not_change_the_output():
    layer = perturb(one_layer(COLA(rank=3, alpha=4.5), 33, 57), size=0.3)
    x = torch.randn(5, 57)
    before = layer(x)
    layer.finish_link(PlainAccess(), layer.fresh_down(torch.Generator()), cap=None)
    assert not layer.b.any()
    torch.testing.assert_close(layer(x), before, **CLOSE)


def test_the_delta_is_the_sum_of_the_finished_links_and_the_live_pair():
    layer, total, access = layer_with(4)
    assert len(layer.bank_scales) == 12
    torch.testing.assert_close(layer.delta(), total, **CLOSE)
    live = perturb(layer, seed=9).scale * (layer.b @ layer.a).detach()
    torch.testing.assert_close(layer.delta(), total + live, **CLOSE)
    assert layer.factors().rank == 15
    assert access.resets[-2:] == [layer.a, layer.b]


def test_zero_components_are_not_stored():
    layer = perturb(one_layer(COLA(rank=3, alpha=3), 33, 57))
    layer.b.data[:, 1] = 0.0
    layer.finish_link(PlainAccess(), layer.fresh_down(torch.Generator()), cap=None)
    assert layer.bank_down.shape == (2, 57)


def test_recompressing_keeps_the_best_approximation_and_records_the_error():
    layer, total, _ = layer_with(4)
    layer.recompress(5)
    s = torch.linalg.svdvals(total)
    assert layer.bank_down.shape == (5, 57)
    error = (layer.delta() - total).norm() / total.norm()
    assert error.item() == pytest.approx((s[5:].norm() / s.norm()).item(), rel=1e-4)
    assert layer.bank_error.item() == pytest.approx(error.item(), rel=1e-4)


def test_recompressing_to_the_full_rank_loses_nothing():
    layer, total, _ = layer_with(2)
    layer.recompress(6)
    torch.testing.assert_close(layer.delta(), total, **CLOSE)
    assert layer.bank_error < 1e-5


def test_the_best_pair_equals_a_truncated_svd():
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(7, 40, generator=draw), torch.randn(30, 7, generator=draw)
    u, s, vh = torch.linalg.svd(up @ down)
    a, b = best_of_rank(down, up, 3)
    torch.testing.assert_close(b @ a, u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-4)
    assert pair_norm(down, up) == pytest.approx((up @ down).norm().item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(8, 64), (64, 8)])
def test_recompressing_a_bank_larger_than_the_full_rank_is_lossless(shape):
    layer = one_layer(COLA(rank=13, alpha=13.0), *shape)
    draw = torch.Generator().manual_seed(0)
    down, up = (torch.randn(size, generator=draw) for size in ((13, shape[1]), (shape[0], 13)))
    layer.deposit(down, up, 0.5)
    layer.recompress(12)
    torch.testing.assert_close(layer.delta(), 0.5 * up @ down, rtol=1e-4, atol=1e-4)
    assert layer.bank_down.shape == (8, shape[1])


def test_the_error_includes_the_rounding_of_the_factors():
    layer = one_layer(COLA(rank=3, alpha=3.0), 33, 57, dtype=torch.bfloat16)
    perturb(layer, size=0.3)
    layer.finish_link(PlainAccess(), layer.fresh_down(torch.Generator()), cap=None)
    before = layer.delta()
    for _ in range(5):
        layer.recompress(3)
    error = ((layer.delta() - before).norm() / before.norm()).item()
    assert 1e-4 < error <= layer.bank_error.item() < 0.05


def test_dropout_does_not_apply_to_the_bank():
    layer, _, _ = layer_with(2)
    layer.dropout = 0.5
    x = torch.randn(5, 57)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), **CLOSE)  # the live B is zero


def test_zero_components_are_not_exported():
    layer, total, _ = layer_with(2)
    pair = layer.factors()
    assert pair.rank == 6
    torch.testing.assert_close(pair.up @ pair.down, total, **CLOSE)
    assert layer.factors(5) is None


def test_scales_are_not_rounded_into_bf16_factors():
    layer = one_layer(COLA(rank=3, alpha=1.0), 33, 57, dtype=torch.bfloat16)
    perturb(layer, size=0.3)
    expected = (1 / 3) * (layer.b.float() @ layer.a.float()).detach()
    layer.finish_link(PlainAccess(), layer.fresh_down(torch.Generator()), cap=None)
    assert layer.bank_down.dtype == torch.bfloat16
    torch.testing.assert_close(layer.delta(), expected, rtol=1e-6, atol=1e-7)


def test_a_warm_start_makes_a_pair_of_any_rank_the_first_link():
    layer = one_layer(COLA(rank=3), 33, 57)
    draw = torch.Generator().manual_seed(0)
    pair = Factors(torch.randn(9, 57, generator=draw), torch.randn(33, 9, generator=draw))
    layer.warm_start(pair)
    torch.testing.assert_close(layer.delta(), pair.up @ pair.down, rtol=1e-5, atol=1e-4)
