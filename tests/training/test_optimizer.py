"""AdamW over bf16 parameters: small updates are not lost, groups and states are right."""

import pytest
import torch
from torch import nn

from qlora_lite.adapters.method import ParameterGroup
from qlora_lite.training.optimizer import AdamW, _code_of_zero, round_stochastically

SETTINGS = {"weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "states": "32bit"}


def draw():
    return torch.Generator().manual_seed(0)


def adamw(groups, rounding="master"):
    return AdamW(groups, rounding=rounding, **SETTINGS)


def group(*parameters, **options):
    names = tuple(f"p{i}" for i in range(len(parameters)))
    return ParameterGroup(names, parameters, **options)


def move(optimizer, parameters, gradients, lr=1e-2):
    optimizer.set_gradients(
        {p: g.clone().float() for p, g in zip(parameters, gradients, strict=True)}
    )
    optimizer.step(lr, draw())
    optimizer.clear_gradients()


def test_fp32_parameters_follow_torchs_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(5, 3)), None
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = adamw([group(ours)])
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(10):
        gradient = torch.randn(5, 3)
        move(optimizer, [ours], [gradient])
        theirs.grad = gradient
        reference.step()
    assert torch.equal(ours, theirs)


def test_a_bf16_parameter_is_the_rounded_value_of_an_fp32_run():
    torch.manual_seed(1)
    start = torch.randn(4, 4).bfloat16()
    ours, twin = nn.Parameter(start.clone()), nn.Parameter(start.float())
    optimizer, exact = adamw([group(ours)]), adamw([group(twin)])
    for _ in range(50):
        gradient = torch.randn(4, 4)
        move(optimizer, [ours], [gradient], lr=1e-5)
        move(exact, [twin], [gradient], lr=1e-5)
    assert torch.equal(ours, twin.bfloat16())


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_a_thousand_small_updates_add_up_in_bf16(rounding):
    # plain bf16 stays at 0.5 for ever: 2e-5 is below its spacing of 2^-9
    parameter = nn.Parameter(torch.full((2000,), 0.5, dtype=torch.bfloat16))
    optimizer = AdamW(
        [group(parameter)],
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        states="32bit",
        rounding=rounding,
    )
    generator = draw()
    for _ in range(1000):
        optimizer.set_gradients({parameter: torch.ones(2000)})
        optimizer.step(2e-5, generator)
        optimizer.clear_gradients()
    assert parameter.float().mean().item() == pytest.approx(0.48, abs=5e-4)


def test_stochastic_rounding_is_correct_on_average_and_keeps_exact_values():
    value = torch.full((20_000,), 1.0 + 2**-9 + 2**-10)  # 3/8 of the way to the next bf16 number
    rounded = round_stochastically(value, draw()).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(value[0].item(), abs=1e-4)
    exact = torch.tensor([-3.0, 0.0, 0.15625, -1e-20]).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), draw()), exact)


def test_groups_have_their_own_rate_and_decay():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = adamw(
        [
            ParameterGroup(("a",), (a,), lr_factor=1.0),
            ParameterGroup(("b",), (b,), lr_factor=16.0, decays=False),
        ]
    )
    move(optimizer, [a, b], [torch.zeros(3), torch.zeros(3)], lr=0.01)
    assert torch.equal(b, torch.ones(3))  # no gradient, no decay
    torch.testing.assert_close(a, torch.full((3,), 1 - 0.01 * 0.1))
    assert [g["lr"] for g in optimizer.inner.param_groups] == [0.01, 0.16]


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_a_restored_optimizer_continues_bit_for_bit(rounding):
    torch.manual_seed(2)
    gradients = [torch.randn(6, 2) for _ in range(8)]
    start = torch.randn(6, 2).bfloat16()

    def run(parameter, optimizer, steps):
        for gradient in steps:
            move(optimizer, [parameter], [gradient])

    uninterrupted = nn.Parameter(start.clone())
    run(uninterrupted, adamw([group(uninterrupted)], rounding), gradients)

    first = nn.Parameter(start.clone())
    optimizer = adamw([group(first)], rounding)
    run(first, optimizer, gradients[:3])
    saved = {k: v.clone() for k, v in optimizer.state_dict().items()}

    second = nn.Parameter(first.detach().clone())
    restored = adamw([group(second)], rounding)
    restored.load_state_dict(saved)
    run(second, restored, gradients[3:])
    assert torch.equal(uninterrupted, second)


def test_8_bit_moments_are_reset_to_the_code_of_zero():
    from bitsandbytes.functional import create_dynamic_map

    signed, unsigned = create_dynamic_map(), create_dynamic_map(signed=False)
    where = torch.tensor([[True, False]])
    state = {"qmap1": signed, "qmap2": unsigned}
    for name, qmap in (("state1", signed), ("state2", unsigned)):
        codes = torch.full((1, 2), 200, dtype=torch.uint8)
        codes.masked_fill_(where, _code_of_zero(state, name))
        assert qmap[codes[0, 0].long()] == 0
        assert codes[0, 1] == 200


def test_resetting_clears_all_or_a_part_of_the_moments():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = adamw([group(p)])
    move(optimizer, [p], [torch.ones(2, 2)])
    optimizer.reset_optimizer_state(p, torch.tensor([[True, True], [False, False]]))
    moment = optimizer.inner.state[p]["exp_avg"]
    assert not moment[0].any()
    assert moment[1].all()
    optimizer.reset_optimizer_state(p)
    assert p not in optimizer.inner.state
