"""LoRA-Mini: frozen outer matrices, a start with gradients, and the sizes of the matrices."""

import pytest
import torch

from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.seeds import generator
from qlora_lite.methods.lora import LoRA, LoRAMethod
from qlora_lite.methods.lora_mini import LoRAMini, LoRAMiniMethod, inner_sizes, outer_matrices
from qlora_lite.model.quant import FP32, NF4
from qlora_lite.model.targets import LinearSpec
from tests.tiny import save_tiny
from tests.workbench import CLOSE, Bench, one_layer, perturb

SMALL = {"rank": 3, "alpha": 6, "inner_down": 7, "inner_up": 5}


def made(settings=None, d_out=33, d_in=57, **how):
    return one_layer(settings or LoRAMini(**SMALL), d_out, d_in, method=LoRAMiniMethod, **how)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def bench(directory, settings=None, **how):
    settings = settings or LoRAMini(rank=4, alpha=8)
    return Bench(directory, settings, method=LoRAMiniMethod, **how)


def test_the_tensors_have_the_shapes_of_the_paper():
    shapes = {name: tuple(tensor.shape) for name, tensor in made().state().items()}
    assert shapes == {"a_aux": (7, 57), "a_in": (3, 7), "b_in": (5, 3), "b_aux": (33, 5)}


@pytest.mark.parametrize("aux", ["gaussian", "orthogonal"])
def test_values_and_gradients_are_those_of_the_formula(aux):
    layer = perturb(made(LoRAMini(**SMALL, aux=aux), quant=NF4()))
    x = torch.randn(4, 57, requires_grad=True)
    weights = torch.randn(4, 33)
    trained = [layer.a_in, layer.b_in]
    exact = [t.detach().double().requires_grad_() for t in (x, *trained)]
    naive = exact[0] @ layer.base.dense().double().T + 6 / 3 * torch.einsum(
        "ob,br,ra,ai,ni->no",
        layer.b_aux.double(),
        exact[2],
        exact[1],
        layer.a_aux.double(),
        exact[0],
    )
    found = layer(x)
    torch.testing.assert_close(found.double(), naive, **CLOSE)
    expected = torch.autograd.grad((naive * weights).sum(), exact)
    gradients = torch.autograd.grad((found * weights).sum(), [x, *trained])
    for got, want in zip(gradients, expected, strict=True):
        # sums over 33 outputs or 4 x 57 inputs
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_output_equals_the_base_bit_for_bit(dtype):
    layer = made(dtype=dtype)
    x = torch.randn(3, 5, 57)
    assert torch.equal(layer(x), layer.base(x))


def test_b_in_has_a_gradient_at_the_start_and_a_in_after_one_step():
    layer = made()
    x = torch.randn(9, 57)
    optimizer = torch.optim.SGD(layer.trained().values(), lr=0.1)
    layer(x).square().sum().backward()
    assert layer.b_in.grad.abs().min() > 0
    assert not layer.a_in.grad.any()
    optimizer.step()
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.a_in.grad.abs().min() > 0


def test_both_inner_matrices_at_zero_would_have_no_gradient():
    """The start of a public implementation, and why we do not use it."""
    layer = made()
    layer.a_in.data.zero_()
    layer(torch.randn(9, 57)).square().sum().backward()
    assert not layer.a_in.grad.any()
    assert not layer.b_in.grad.any()


@pytest.mark.parametrize(
    ("rank", "d_in", "d_out", "down", "up", "sizes"),
    [
        (16, 4096, 4096, None, None, (204, 204)),
        (16, 4096, 14336, None, None, (460, 460)),
        (16, 64, 64, None, None, (32, 32)),
        (16, 20, 64, None, None, (20, 32)),
        (16, 4096, 4096, 64, 64, (64, 64)),
        (16, 4096, 4096, 64, None, (64, 204)),
        (4, 33, 57, 1000, 1000, (33, 57)),
    ],
)
def test_inner_sizes(rank, d_in, d_out, down, up, sizes):
    assert inner_sizes(rank, d_in, d_out, down, up) == sizes


def test_the_default_trains_a_twentieth_of_lora_and_size_64_a_64th():
    lora = 16 * (4096 + 4096)
    assert lora / (16 * sum(inner_sizes(16, 4096, 4096, None, None))) == pytest.approx(20, rel=0.01)
    assert lora / (16 * sum(inner_sizes(16, 4096, 4096, 64, 64))) == 64


def test_the_count_and_the_memory_plan_match_the_tensors():
    layer = made()
    assert layer.trainable_count() == 3 * (7 + 5)
    assert {id(p) for p in layer.parameters() if p.requires_grad} == {
        id(layer.a_in),
        id(layer.b_in),
    }
    footprint = layer.method.footprint(
        LinearSpec("blocks.0.linear", 57, 33, 0, 1, "other"), layer.plan
    )
    assert footprint.trained == sum(p.numel() for p in layer.trained().values())
    assert footprint.frozen == layer.a_aux.numel() + layer.b_aux.numel()
    assert footprint.width == 7 + 3  # the inputs of A_in and B_in


@pytest.mark.parametrize("aux", ["gaussian", "orthogonal"])
def test_the_start_has_the_variance_of_lora(aux):
    a_aux, b_aux = outer_matrices(400, 300, 60, 50, aux, generator(0))
    assert a_aux.square().mean().item() == pytest.approx(1 / 400, rel=0.03)
    assert b_aux.square().mean().item() == pytest.approx(1 / 50, rel=0.03)
    settings = LoRAMini(rank=30, inner_down=200, inner_up=100, aux=aux)
    layer = made(settings, d_out=300, d_in=400)
    assert layer.a_in.abs().max() <= 200**-0.5
    down, _ = layer.live_factors()
    assert down.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.05)


def test_orthogonal_outer_matrices_are_orthogonal():
    a_aux, b_aux = outer_matrices(57, 33, 7, 5, "orthogonal", generator(0))
    torch.testing.assert_close(a_aux @ a_aux.T, torch.eye(7), **CLOSE)
    torch.testing.assert_close(b_aux.T @ b_aux, 33 / 5 * torch.eye(5), **CLOSE)


@pytest.mark.parametrize("aux", ["gaussian", "orthogonal"])
def test_the_outer_matrices_depend_on_the_seed_alone(aux):
    settings = LoRAMini(**SMALL, aux=aux)
    torch.manual_seed(1)
    first = made(settings)
    torch.manual_seed(2)
    again, rounded = made(settings), made(settings, dtype=torch.bfloat16)
    other = made(settings, seed=1)
    for name in ("a_aux", "b_aux"):
        one = getattr(first, name)
        assert torch.equal(getattr(again, name), one)
        assert torch.equal(getattr(rounded, name), one.bfloat16())
        assert not torch.equal(getattr(other, name), one)


def test_layers_have_different_outer_matrices(directory):
    layers = bench(directory).attached.layers
    first, second = (layers[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    assert not torch.equal(first.a_aux, second.a_aux)


def test_training_does_not_change_the_outer_matrices(directory):
    it = bench(directory, weight_decay=0.1)
    before = {name: tensor.clone() for name, tensor in it.attached.state().items()}
    for _ in range(3):
        it.step()
    after = it.attached.state()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == name.endswith("_aux")
    assert not any(layer.a_aux.requires_grad for layer in it.attached.layers.values())


def test_with_identities_as_outer_matrices_it_equals_lora_to_the_bit(directory):
    mini = bench(directory, LoRAMini(rank=4, alpha=8, inner_down=10_000, inner_up=10_000))
    lora = Bench(directory, LoRA(rank=4, alpha=8), method=LoRAMethod)
    for path, layer in mini.attached.layers.items():
        layer.a_aux = torch.eye(layer.base.d_in)
        layer.b_aux = torch.eye(layer.base.d_out)
        layer.a_in.data.copy_(lora.attached.layers[path].a)
    assert [mini.step() for _ in range(4)] == [lora.step() for _ in range(4)]
    for path, layer in mini.attached.layers.items():
        assert torch.equal(layer.b_in, lora.attached.layers[path].b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exported_pair_equals_the_forward(dtype):
    layer = perturb(made(quant=FP32(), dtype=dtype))
    pair = layer.factors()
    assert pair.down.shape == (3, 57)
    assert pair.up.shape == (33, 3)
    assert pair.up.dtype == pair.down.dtype == torch.float32
    assert pair.relative_error == 0
    assert torch.linalg.matrix_rank(layer.delta()) == 3
    x = torch.randn(4, 57)
    torch.testing.assert_close(layer(x) - layer.base(x), x @ (pair.up @ pair.down).T, **CLOSE)


def test_a_reload_uses_the_saved_outer_matrices(directory):
    """Another seed would draw other matrices."""
    first = bench(directory)
    first.step()
    second = bench(directory, seed=1, saved=first.attached.state())
    assert torch.equal(second.logits(), first.logits())
    drawn = bench(directory, seed=1)
    path = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(drawn.attached.layers[path].a_aux, first.attached.layers[path].a_aux)


def test_building_from_a_saved_state_draws_no_outer_matrix():
    layer = made()
    spec = LinearSpec("blocks.0.linear", 57, 33, 0, 1, "other")
    again = layer.method.build(layer.base, spec, layer.plan, layer.state(), generator(1))
    assert torch.equal(again.a_aux, layer.a_aux)
    assert torch.equal(again.b_aux, layer.b_aux)
    assert again.a_aux is not layer.a_aux


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (LoRAMini(rank=8, inner_down=4), ["inner_down=4", "rank 8 of blocks.0.linear", "=8 or"]),
        (LoRAMini(rank=2, inner_up=4, ranks={"0": 6}), ["inner_up=4", "rank 6", "=6 or more"]),
    ],
)
def test_an_inner_size_below_the_rank_is_an_error_with_the_layer(settings, words):
    with pytest.raises(AdapterError) as caught:
        made(settings)
    for word in words:
        assert word in str(caught.value)


def test_ranks_are_limited_to_the_full_rank_of_the_weight():
    layer = one_layer(LoRAMini(rank=40, alpha=66), 33, 57)
    assert layer.a_in.shape[0] == 33
    assert layer.scale == 2.0
