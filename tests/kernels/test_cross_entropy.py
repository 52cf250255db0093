"""The chunked loss equals its definition: value and every gradient."""

import pytest
import torch
from torch.nn import functional as F

from qlora_lite.kernels.cross_entropy import IGNORED, linear_cross_entropy, reference

FP32 = {"rtol": 1e-5, "atol": 1e-6}
BF16 = {"rtol": 2e-2, "atol": 2e-3}  # 8 significant bits
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-6}  # of a gradient, relative in norm


def case(num_tokens, hidden=24, vocabulary=53, dtype=torch.float32, ignored=0.4):
    draw = torch.Generator().manual_seed(num_tokens)
    states = torch.randn(2, num_tokens, hidden, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (2, num_tokens), generator=draw)
    targets[torch.rand(2, num_tokens, generator=draw) < ignored] = IGNORED
    return states, weight, targets


def naive(states, weight, targets):
    return F.cross_entropy(
        (states @ weight.T).float().flatten(0, 1), targets.flatten(), reduction="sum"
    )


def distance(tensor, expected):
    """Frobenius norm of the difference relative to what is expected; 0 where both are 0."""
    return ((tensor - expected).float().norm() / expected.float().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 65])
@pytest.mark.parametrize(("dtype", "bounds"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_reference_is_torchs_cross_entropy(num_tokens, dtype, bounds):
    states, weight, targets = case(num_tokens, dtype=dtype)
    ours = reference(states, targets, lambda h: h @ weight.T)
    torch.testing.assert_close(ours, naive(states, weight, targets), **bounds)


@pytest.mark.parametrize("head_is_trained", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_the_value_and_the_gradients_of_the_reference(
    num_tokens, dtype, head_is_trained
):
    states, weight, targets = case(num_tokens, dtype=dtype)
    (3 * reference(states, targets, lambda h: h @ weight.T)).backward()
    expected = states.grad.clone(), weight.grad.clone()
    value = reference(states, targets, lambda h: h @ weight.T).detach()
    states.grad = weight.grad = None

    frozen = weight if head_is_trained else weight.detach()
    loss = linear_cross_entropy(
        states,
        targets,
        lambda h: h @ frozen.T,
        head_is_trained=head_is_trained,
        chunk_tokens=16,
    )
    (3 * loss).backward()
    torch.testing.assert_close(loss.detach(), value, rtol=1e-5, atol=1e-5)
    assert distance(states.grad, expected[0]) < BOUNDS[dtype]
    if head_is_trained:
        assert distance(weight.grad, expected[1]) < BOUNDS[dtype]


def test_an_extra_loss_on_the_outputs_is_summed_over_chunks_and_has_its_gradient():
    states, weight, targets = case(40)

    def extra(logits, targets, beside):
        return 0.1 * logits.square().sum()

    expected = torch.autograd.grad(
        reference(states, targets, lambda h: h @ weight.T, extra), states
    )[0]
    loss = linear_cross_entropy(
        states, targets, lambda h: h @ weight.detach().T, extra, chunk_tokens=9
    )
    torch.testing.assert_close(torch.autograd.grad(loss, states)[0], expected, **FP32)


def test_a_batch_without_trained_tokens_has_no_loss_and_no_gradient():
    states, weight, targets = case(5)
    targets.fill_(IGNORED)
    loss = linear_cross_entropy(states, targets, lambda h: h @ weight.detach().T)
    loss.backward()
    assert loss.item() == 0
    assert not states.grad.any()


def test_without_gradients_the_value_is_the_same():
    states, weight, targets = case(33)
    with torch.no_grad():
        loss = linear_cross_entropy(states, targets, lambda h: h @ weight.T, chunk_tokens=8)
    torch.testing.assert_close(loss, naive(states, weight, targets).detach(), **FP32)


def test_logits_never_exist_for_more_than_a_chunk():
    states, weight, targets = case(200, ignored=0.0)
    seen = []

    def logits_of(hidden):
        seen.append(len(hidden))
        return hidden @ weight.detach().T

    linear_cross_entropy(states, targets, logits_of, chunk_tokens=32).backward()
    assert max(seen) == 32
    assert sum(seen) == 400  # once each: nothing is projected twice
