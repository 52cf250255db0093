"""MELoRA: block-diagonal mini LoRAs, whose ranks add up at the count of one LoRA."""

import pytest
import torch

from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.lora import LoRA, LoRAMethod
from qlora_lite.methods.melora import MELoRA, MELoRAMethod
from qlora_lite.model.quant import NF4
from qlora_lite.model.targets import LinearSpec
from tests.tiny import save_tiny
from tests.workbench import CLOSE, Bench, one_layer, perturb

SMALL = {"rank": 2, "num_blocks": 3, "alpha": 6, "dropout": 0.0}


def made(settings=None, d_out=33, d_in=57, **how):
    return one_layer(settings or MELoRA(**SMALL), d_out, d_in, method=MELoRAMethod, **how)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def bench(directory, settings, **how):
    return Bench(directory, settings, method=MELoRAMethod, **how)


def test_the_defaults_are_those_of_the_authors_llama_script():
    settings = MELoRA()
    assert (settings.num_blocks, settings.rank, settings.alpha) == (8, 1, 16)
    assert settings.dropout == 0.05


def test_there_is_one_pair_per_slice():
    shapes = {name: tuple(tensor.shape) for name, tensor in made().state().items()}
    assert shapes == {"a": (3, 2, 19), "b": (3, 11, 2)}


def test_values_and_gradients_are_those_of_a_loop_over_the_slices():
    layer = perturb(made(quant=NF4()))
    x = torch.randn(2, 5, 57, requires_grad=True)
    weights = torch.randn(2, 5, 33)
    outputs = []
    for i in range(3):
        a, b = layer.a[i], layer.b[i]
        outputs.append(6 / 2 * (x[..., 19 * i : 19 * i + 19] @ a.T) @ b.T)
    naive = x @ layer.base.dense().T + torch.cat(outputs, -1)
    found = layer(x)
    torch.testing.assert_close(found, naive, **CLOSE)
    tensors = [x, layer.a, layer.b]
    expected = torch.autograd.grad((naive * weights).sum(), tensors)
    gradients = torch.autograd.grad((found * weights).sum(), tensors)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_output_equals_the_base_bit_for_bit(dtype):
    layer = made(dtype=dtype)
    x = torch.randn(3, 5, 57)
    assert torch.equal(layer(x), layer.base(x))


def test_every_mini_starts_as_a_lora_over_its_own_inputs():
    layer = made(MELoRA(rank=20, num_blocks=4), d_out=8, d_in=400)
    assert 400**-0.5 < layer.a.abs().max() <= 100**-0.5
    assert layer.a.std().item() == pytest.approx((3 * 100) ** -0.5, rel=0.05)
    assert not layer.b.any()
    assert not torch.equal(layer.a[0], layer.a[1])


def test_the_update_is_block_diagonal_with_the_sum_of_the_ranks():
    layer = perturb(made())
    delta = layer.delta()
    on_diagonal = torch.block_diag(*[torch.ones(11, 19)] * 3).bool()
    assert not delta[~on_diagonal].any()
    assert delta[on_diagonal].all()
    assert torch.linalg.matrix_rank(delta) == 3 * 2


def test_a_slice_of_the_inputs_affects_only_its_own_slice_of_the_outputs():
    layer = perturb(made())
    x = torch.randn(4, 57)
    other = x.clone()
    other[:, 19:38] += 1
    changed = layer.update(x) != layer.update(other)
    assert changed[:, 11:22].all()
    assert not changed[:, :11].any()
    assert not changed[:, 22:].any()


def test_it_has_the_count_of_one_lora_of_the_rank_of_a_mini():
    layer = made()
    assert layer.trainable_count() == 2 * (57 + 33)
    assert layer.trainable_count() == sum(p.numel() for p in layer.trained().values())
    same_rank = one_layer(LoRA(rank=3 * 2), 33, 57, method=LoRAMethod)
    assert same_rank.trainable_count() == 3 * layer.trainable_count()
    footprint = layer.method.footprint(
        LinearSpec("blocks.0.linear", 57, 33, 0, 1, "other"), layer.plan
    )
    assert (footprint.width, footprint.trained, footprint.frozen) == (6, 180, 0)


def test_the_scale_is_that_of_one_mini():
    assert made().scale == 6 / 2
    assert made(MELoRA(**SMALL | {"scaling": "alpha/sqrt(r)"})).scale == 6 / 2**0.5


def test_the_exported_pair_is_block_diagonal_and_equals_the_forward():
    layer = perturb(made())
    pair = layer.factors()
    assert pair.down.shape == (6, 57)
    assert pair.up.shape == (33, 6)
    assert pair.relative_error == 0
    for i in range(3):
        rows, inputs, outputs = (
            slice(2 * i, 2 * i + 2),
            slice(19 * i, 19 * i + 19),
            slice(11 * i, 11 * i + 11),
        )
        assert torch.equal(pair.down[rows, inputs], layer.a[i])
        assert torch.equal(pair.up[outputs, rows], layer.b[i] * layer.scale)
    assert pair.down.count_nonzero() == layer.a.numel()
    assert pair.up.count_nonzero() == layer.b.numel()
    x = torch.randn(4, 57)
    torch.testing.assert_close(layer.update(x), x @ (pair.up @ pair.down).T, **CLOSE)


def test_with_one_block_it_trains_like_lora(directory):
    one = bench(directory, MELoRA(rank=4, alpha=8, num_blocks=1, dropout=0.0))
    lora = Bench(directory, LoRA(rank=4, alpha=8), method=LoRAMethod)
    for path, layer in one.attached.layers.items():
        assert torch.equal(layer.a[0], lora.attached.layers[path].a)
    expected = [lora.step() for _ in range(5)]
    # the batched kernel sums in another order: the last bits of a loss near 6, and of b near 0.08
    assert [one.step() for _ in range(5)] == pytest.approx(expected, abs=2e-6)
    for path, layer in one.attached.layers.items():
        b = lora.attached.layers[path].b
        assert b.abs().max() > 0.01
        torch.testing.assert_close(layer.b[0], b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("d_in", "d_out"), [(57, 32), (56, 33)])
def test_features_that_the_blocks_do_not_divide_are_an_error_with_the_layer(d_in, d_out):
    with pytest.raises(AdapterError) as caught:
        made(d_in=d_in, d_out=d_out)
    for word in ("num_blocks=3", "blocks.0.linear", "divisor of 1", '{"blocks.0.linear": 0}'):
        assert word in str(caught.value)


def test_a_layer_of_rank_0_need_not_be_divisible():
    specs = [LinearSpec("odd", 57, 32, 0, 1, "other"), LinearSpec("even", 57, 33, 0, 1, "other")]
    plans = MELoRAMethod(MELoRA(**SMALL, ranks={"odd": 0})).plan(specs)
    assert set(plans) == {"even"}
