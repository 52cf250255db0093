"""The chunked loss against its definition: value and every gradient."""

import pytest
import torch

from qlora_lite.kernels.cross_entropy import IGNORE_INDEX, linear_cross_entropy, reference

FP32 = {"rtol": 1e-5, "atol": 1e-6}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-9}
"""Relative error of a gradient, in norm: in bf16 up to four more roundings of 2^-9 each, where the
gradient is scaled by the outer factor and summed over chunks."""


def case(num_tokens, hidden=24, vocabulary=53, dtype=torch.float32, ignored=0.4):
    rng = torch.Generator().manual_seed(num_tokens)
    states = torch.randn(2, num_tokens, hidden, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden, generator=rng).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (2, num_tokens), generator=rng)
    targets[torch.rand(2, num_tokens, generator=rng) < ignored] = IGNORE_INDEX
    return states, weight, targets


def naive(states, weight, targets):
    """In fp64, from logits in the dtype of the model."""
    trained = targets != IGNORE_INDEX
    log_probabilities = (states[trained] @ weight.T).double().log_softmax(1)
    return -log_probabilities.gather(1, targets[trained][:, None]).sum().float()


def distance(tensor, expected):
    """Frobenius norm of the difference, relative to that of `expected`."""
    return ((tensor - expected).float().norm() / expected.float().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_sums_minus_log_softmax_in_fp32(num_tokens, dtype):
    states, weight, targets = case(num_tokens, dtype=dtype)
    ours = reference(states, targets, lambda h: h @ weight.T)
    torch.testing.assert_close(ours, naive(states, weight, targets), **FP32)


@pytest.mark.parametrize("head_is_trained", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_have_the_value_and_the_gradients_of_the_reference(
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


def test_an_extra_loss_is_summed_over_chunks_and_has_a_gradient():
    states, weight, targets = case(40)

    def extra(logits, targets, extra_inputs):
        return 0.1 * logits.square().sum()

    expected = torch.autograd.grad(
        reference(states, targets, lambda h: h @ weight.T, extra), states
    )[0]
    loss = linear_cross_entropy(
        states, targets, lambda h: h @ weight.detach().T, extra, chunk_tokens=9
    )
    torch.testing.assert_close(torch.autograd.grad(loss, states)[0], expected, **FP32)


@pytest.mark.parametrize("head_is_trained", [False, True])
def test_in_bf16_losses_and_gradients_of_many_chunks_are_summed_in_fp32(head_is_trained):
    # 640 equal tokens, one a chunk: in bf16 a sum of equal terms stops growing at 256 of them
    row = torch.randn(24, generator=torch.Generator().manual_seed(0)).bfloat16()
    states = row.expand(1, 640, 24).contiguous().requires_grad_()
    weight = torch.randn(53, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.full((1, 640), 7)
    loss = linear_cross_entropy(
        states,
        targets,
        lambda h: h @ (weight if head_is_trained else weight.detach()).to(h.dtype).T,
        head_is_trained=head_is_trained,
        chunk_tokens=1,
    )
    loss.backward()
    exact = weight.detach().bfloat16().double().requires_grad_()
    expected = naive(row.double().expand(1, 640, 24), exact, targets)
    expected.backward()
    # what is left is one rounding to bf16: of the logits, and of each token's gradient
    assert loss.item() == pytest.approx(expected.item(), rel=2**-7)
    if head_is_trained:
        assert distance(weight.grad, exact.grad) < 2**-7
    assert distance(states.grad[0, 0], states.grad[0, -1]) == 0


def test_a_batch_without_trained_tokens_has_no_loss_and_no_gradient():
    states, weight, targets = case(5)
    targets.fill_(IGNORE_INDEX)
    loss = linear_cross_entropy(states, targets, lambda h: h @ weight.detach().T)
    loss.backward()
    assert loss.item() == 0
    assert not states.grad.any()


def test_without_trained_tokens_a_trained_head_has_a_gradient_of_zeros():
    states, weight, targets = case(5)
    targets.fill_(IGNORE_INDEX)
    loss = linear_cross_entropy(states, targets, lambda h: h @ weight.T, head_is_trained=True)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(states.grad, torch.zeros_like(states))


def test_the_value_under_no_grad_is_the_same():
    states, weight, targets = case(33)
    with torch.no_grad():
        loss = linear_cross_entropy(states, targets, lambda h: h @ weight.T, chunk_tokens=8)
    torch.testing.assert_close(loss, naive(states, weight, targets).detach(), **FP32)


def test_at_most_one_chunk_of_logits_exists():
    states, weight, targets = case(200, ignored=0.0)
    seen = []

    def logits_of(hidden):
        seen.append(len(hidden))
        return hidden @ weight.detach().T

    linear_cross_entropy(states, targets, logits_of, chunk_tokens=32).backward()
    assert max(seen) == 32
    assert sum(seen) == 400  # each token is projected once
