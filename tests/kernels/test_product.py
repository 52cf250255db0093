"""Products by oneDNN equal torch's, in every layout that is passed to them, and as fast."""

import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from qlora_lite.kernels.product import has_onednn, product, reference

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")

TOKENS, D_IN, D_OUT = 33, 80, 48


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


INPUTS = {
    "plain": draw(TOKENS, D_IN),
    "columns of a wider tensor": draw(TOKENS, 3 * D_IN)[:, 7 : 7 + D_IN],
    "transposed": draw(D_IN, TOKENS).T,
    "one row expanded": draw(1, D_IN).expand(TOKENS, D_IN),
    "no rows": draw(0, D_IN),
    "one row": draw(1, D_IN),
}
WEIGHTS = {
    "plain": draw(D_OUT, D_IN),
    "transposed": draw(D_IN, D_OUT).T,
    "transposed slice": draw(D_IN, 3 * D_OUT)[:, 5 : 5 + D_OUT].T,
    "every second column": draw(D_OUT, 2 * D_IN)[:, ::2],
    "one row": draw(1, D_IN),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("x", INPUTS)
def test_it_is_the_product_to_the_rounding_of_fp32(x, weight):
    x, weight = INPUTS[x], WEIGHTS[weight]
    exact = x.double() @ weight.double().T
    # each of D_IN products and sums rounds once: the bound on the error of any order of sums
    bound = D_IN * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    for found in (product(x, weight, "onednn"), reference(x, weight)):
        assert (found.double() - exact).abs().le(bound).all()


def test_it_writes_into_a_slice():
    x, weight = INPUTS["plain"], WEIGHTS["plain"]
    whole = torch.zeros(TOKENS, 2 * D_OUT)
    product(x, weight, "onednn", out=whole[:, D_OUT:])
    assert torch.equal(whole[:, D_OUT:], product(x, weight, "onednn"))
    assert not whole[:, :D_OUT].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_multiplied_by_torch(dtype):
    x, weight = INPUTS["plain"].to(dtype), WEIGHTS["plain"].to(dtype)
    assert torch.equal(product(x, weight, "onednn"), reference(x, weight))


def test_its_shape_is_known_without_data():
    with FakeTensorMode():
        assert product(torch.ones(4, 8), torch.ones(3, 8), "onednn").shape == (4, 3)


def test_no_layout_takes_a_slow_path():
    # oneDNN's reference kernel, to which a transposed slice falls, is about 1,000 times as slow
    rows, wide = draw(256, 512), draw(512, 1024)
    weights = [draw(512, 512), draw(512, 512).T, wide[:, 3:515], wide[:, 3:515].T]
    for weight in weights:
        by_torch, by_onednn = (shortest(rows, weight, name) for name in ("torch", "onednn"))
        assert by_onednn < 20 * by_torch


def shortest(x, weight, library):
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, weight, library)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_torch_is_used_unless_asked():
    x, weight = INPUTS["plain"], WEIGHTS["plain"]
    assert torch.equal(product(x, weight), torch.mm(x, weight.T))
    assert_close(product(x, weight, "onednn"), torch.mm(x, weight.T))
