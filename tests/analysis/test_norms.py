"""Norms, compared with those of numpy for the dense matrices."""

import numpy as np
import pytest
import torch

from qlora_lite.analysis.norms import delta_norm, relative_norm, weight_norm
from qlora_lite.analysis.rank import svd_of_pair

FP32 = 1e-6


@pytest.fixture
def matrices():
    draw = torch.Generator().manual_seed(3)
    down, up, weight = (torch.randn(s, generator=draw) for s in ((4, 30), (20, 4), (20, 30)))
    return svd_of_pair(down, up).values, (up @ down).numpy(), weight


def test_the_norm_of_a_delta_comes_from_its_singular_values(matrices):
    values, dense, _ = matrices
    assert delta_norm(values) == pytest.approx(np.linalg.norm(dense), rel=FP32)


def test_a_large_fp16_weight_is_summed_without_loss():
    weight = torch.full((300, 300), 0.1, dtype=torch.float16)
    expected = np.linalg.norm(weight.double().numpy())
    assert weight_norm(weight) == pytest.approx(expected, rel=FP32)


def test_the_relative_norm_is_the_quotient_of_both(matrices):
    values, dense, weight = matrices
    expected = np.linalg.norm(dense) / np.linalg.norm(weight.numpy())
    assert relative_norm(values, weight) == pytest.approx(expected, rel=FP32)
    assert relative_norm(2 * values, weight) == pytest.approx(2 * expected, rel=FP32)
