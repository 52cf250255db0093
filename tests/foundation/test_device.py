"""The device rule: compute and storage dtypes, and which devices are refused."""

import pytest
import torch

from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import DeviceError


def test_a_cpu_computes_in_fp32_and_stores_in_bf16():
    rule = choose("cpu")
    assert (rule.compute, rule.storage, rule.norms, rule.adapters, rule.optimizer_states) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        "32bit",
    )
    assert rule.summary.startswith("CPU, ")
    assert "compute fp32" in rule.summary


def test_the_compute_dtype_can_be_overridden():
    assert choose("cpu", "bf16").compute is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_an_absent_device_is_refused_with_a_hint():
    with pytest.raises(DeviceError, match=r"sees no CUDA card.*device=cpu"):
        choose("cuda")


@pytest.mark.parametrize("device", ["mps", "xpu", "gpu", ""])
def test_an_unsupported_device_is_refused(device):
    with pytest.raises(DeviceError, match="cpu and cuda are supported"):
        choose(device)
