"""DoRA: a magnitude per output, and a norm that is constant in backward."""

import pytest
import torch
from torch.nn import functional as F

from qlora_lite.adapters.layer import Factors
from qlora_lite.methods.dora import DoRA, DoRALayer
from qlora_lite.model.quant import FP32, NF4, Int8
from tests.tiny import save_tiny
from tests.workbench import CLOSE, Bench, one_layer, perturb

SETTINGS = DoRA(rank=4, alpha=8, dropout=0.0)


def layer_of(quant=None, **changed):
    return one_layer(SETTINGS.model_copy(update=changed), 33, 57, quant)


def naive(layer, x, m, a, b):
    """Eq. 5 row by row, with a detached norm."""
    weight = layer.base.dense()
    rows = []
    for i in range(layer.base.d_out):
        direction = weight[i] + layer.scale * (b[i] @ a)
        rows.append(m[i] / direction.detach().norm() * (x @ direction))
    return torch.stack(rows, dim=-1)


@pytest.mark.parametrize("quant", [NF4(), Int8(), FP32()])
def test_output_and_gradients_are_those_of_equation_5_with_a_constant_norm(quant):
    layer = perturb(layer_of(quant), size=0.3)
    x = torch.randn(2, 7, 57, generator=torch.Generator().manual_seed(0))
    copies = [p.detach().clone().requires_grad_() for p in (layer.m, layer.a, layer.b)]
    expected = naive(layer, x, *copies)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weights).sum(), copies)
    found = layer(x)
    got = torch.autograd.grad((found * weights).sum(), [layer.m, layer.a, layer.b])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for gradient, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_the_gain_is_one_at_the_start():
    layer = layer_of()
    norms, cancelled = layer._norms(layer.base.matmul(layer.a))
    gain = layer.m / norms
    assert not len(cancelled)
    torch.testing.assert_close(gain, torch.ones(33), rtol=1e-6, atol=1e-6)


def test_rows_of_the_merged_weight_have_the_trained_magnitudes(tmp_path):
    bench = Bench(save_tiny(tmp_path / "base"), SETTINGS)
    for _ in range(5):
        bench.step()
    num_moved = 0
    for layer in bench.attached.layers.values():
        merged = layer.merged(layer.base.dense())
        torch.testing.assert_close(merged.norm(dim=1), layer.m.detach(), **CLOSE)
        num_moved += not torch.equal(layer.m.detach(), layer.squares.sqrt())
    assert num_moved == len(bench.attached.layers)


def test_magnitudes_are_fp32_and_have_the_rate_of_up_factors_without_decay(tmp_path):
    settings = SETTINGS.model_copy(update={"lr_ratio": 4.0})
    bench = Bench(save_tiny(tmp_path / "base"), settings, dtype=torch.bfloat16)
    assert all(layer.m.dtype == torch.float32 for layer in bench.attached.layers.values())
    assert all(layer.a.dtype == torch.bfloat16 for layer in bench.attached.layers.values())
    groups = {name.rpartition(".")[2]: g for g in bench.attached.groups() for name in g.names}
    assert (groups["m"].lr_factor, groups["m"].decays) == (4.0, False)
    assert (groups["a"].lr_factor, groups["a"].decays) == (1.0, True)


def test_dropout_applies_to_the_low_rank_part_only():
    layer = perturb(layer_of(dropout=0.9)).train()
    layer.b.data.zero_()
    x = torch.randn(4, 57)
    gain = layer.m / layer.squares.sqrt()
    torch.testing.assert_close(layer(x), gain * layer.base(x), **CLOSE)


def test_a_warm_start_from_a_plain_lora_gives_the_same_outputs():
    layer = layer_of()
    draw = torch.Generator().manual_seed(3)
    pair = Factors(torch.randn(2, 57, generator=draw), torch.randn(33, 2, generator=draw))
    layer.warm_start(pair)
    x = torch.randn(5, 57, generator=draw)
    expected = F.linear(x, layer.base.dense() + pair.up @ pair.down)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


def with_a_row_of_zeros():
    """A layer at its start on a weight whose row 3 is zero."""
    base = layer_of(FP32()).base
    base.weight.data[3] = 0.0
    a = torch.randn(4, 57, generator=torch.Generator().manual_seed(0))
    return DoRALayer(base, a, torch.zeros(33, 4), scale=2.0)


def test_a_row_of_zeros_has_finite_outputs_and_gradients():
    layer = with_a_row_of_zeros()
    y = layer(torch.randn(2, 57))
    assert y.isfinite().all()
    assert not y[:, 3].any()
    for gradient in torch.autograd.grad(y.square().sum(), [layer.m, layer.a, layer.b]):
        assert gradient.isfinite().all()


def test_a_row_of_zeros_is_merged_as_zeros():
    layer = with_a_row_of_zeros()
    merged = layer.merged(layer.base.dense())
    assert merged.isfinite().all()
    assert not merged[3].any()
    assert layer.delta().isfinite().all()


LEFT = (1e-3, 1e-4, 0.0)
"""What is left of a row's norm after the delta."""


def cancelling(quant, left, dropout=0.0):
    """A layer whose delta cancels rows 3 and 30 up to `left` of their norm."""
    layer = perturb(layer_of(quant, dropout=dropout), size=0.3)
    dense = layer.base.dense().double()
    other = torch.randn(57, generator=torch.Generator().manual_seed(4)).double()
    with torch.no_grad():
        for component, row in enumerate((3, 30)):
            rest = left * dense[row].norm() * other / other.norm()
            layer.a[component] = (rest - dense[row]) / layer.scale
            layer.b[row] = F.one_hot(torch.tensor(component), 4).float()
    return layer


def fp64_weight(layer):
    """The formula in fp64; a row that nothing is left of is zero."""
    delta = layer.scale * layer.b.double() @ layer.a.double()
    direction = layer.base.dense().double() + delta
    norms = direction.norm(dim=1).clamp(min=1e-6).detach()
    return (layer.m.double() / norms)[:, None] * direction


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("quant", [NF4(), FP32()])
def test_a_row_that_the_delta_nearly_cancels_is_exact_in_forward_and_merge(quant, left):
    layer = cancelling(quant, left)
    x = torch.randn(2, 7, 57, generator=torch.Generator().manual_seed(0))
    y, merged = layer(x).detach(), layer.merged(layer.base.dense())
    expected = fp64_weight(layer).detach()
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y.double(), x.double() @ expected.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, F.linear(x, merged), rtol=1e-4, atol=1e-5)


def test_the_gradients_of_a_nearly_cancelled_row_are_those_of_the_formula():
    layer = cancelling(FP32(), 1e-3)
    x = torch.randn(5, 57, generator=torch.Generator().manual_seed(0), requires_grad=True)
    factor = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    leaves = [x, layer.m, layer.a, layer.b]
    found = torch.autograd.grad((layer(x) * factor).sum(), leaves)
    expected = torch.autograd.grad((x.double() @ fp64_weight(layer).T * factor).sum(), leaves)
    for gradient, other in zip(found, expected, strict=True):
        assert (gradient - other).norm() < 1e-4 * other.norm()


def test_a_nearly_cancelled_row_has_the_same_dropout_as_the_others():
    layer = cancelling(FP32(), 1e-1, dropout=0.5).train()
    x = torch.randn(5, 57, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    y = layer(x).detach()
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5, training=True).double()
    delta = layer.scale * layer.b.double() @ layer.a.double()
    dense = layer.base.dense().double()
    gain = layer.m.double() / (dense + delta).norm(dim=1)
    expected = gain * (x.double() @ dense.T + dropped @ delta.T)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant", [NF4(), FP32()])
def test_only_cancelled_rows_are_computed_from_the_dense_weight(quant, monkeypatch):
    """No other bit changes, and without such a row nothing is dequantised again."""
    layer, x = cancelling(quant, 1e-3), torch.randn(5, 57)
    exact, merged = layer(x), layer.merged(layer.base.dense())
    seen = []
    whole = DoRALayer._exact_directions

    def counted(self, weight, rows):
        seen.append(rows.tolist())
        return whole(self, weight, rows)

    monkeypatch.setattr(DoRALayer, "_exact_directions", counted)
    layer(x)
    layer.merged(layer.base.dense())
    assert seen == [[3, 30], [3, 30]]
    monkeypatch.setattr("qlora_lite.methods.dora.CANCELS", 0.0)
    others = torch.tensor([row for row in range(33) if row not in (3, 30)])
    assert torch.equal(layer(x)[:, others], exact[:, others])
    assert torch.equal(layer.merged(layer.base.dense())[others], merged[others])
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_layer_has_no_cancelled_rows(tmp_path, dtype):
    bench = Bench(save_tiny(tmp_path / "base"), SETTINGS, dtype=dtype)
    for _ in range(5):
        bench.step()
    for layer in bench.attached.layers.values():
        _, cancelled = layer._norms(layer.base.matmul(layer.a).float())
        assert not len(cancelled)
