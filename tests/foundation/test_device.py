"""The device rule, and randomness by name."""

import pytest
import torch

from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import DeviceError
from qlora_lite.foundation.seeds import derive, generator


def test_a_cpu_computes_in_fp32_and_rests_in_bf16():
    rule = choose("cpu")
    assert (rule.compute, rule.storage, rule.norms, rule.adapters, rule.optimizer_states) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
        "32bit",
    )
    assert rule.line.startswith("CPU, ")
    assert "compute fp32" in rule.line


def test_another_compute_dtype_is_taken_on_request():
    assert choose("cpu", "bf16").compute is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused_with_what_to_do():
    with pytest.raises(DeviceError, match=r"sees no CUDA card.*device=cpu"):
        choose("cuda")


@pytest.mark.parametrize("device", ["mps", "xpu", "gpu", ""])
def test_a_device_that_was_not_tested_is_refused(device):
    with pytest.raises(DeviceError, match="cpu and cuda are supported"):
        choose(device)


def test_a_stream_depends_on_its_name_and_seed_alone():
    first = torch.rand(3, generator=generator(0, "adapter", "q_proj"))
    assert torch.equal(first, torch.rand(3, generator=generator(0, "adapter", "q_proj")))
    assert not torch.equal(first, torch.rand(3, generator=generator(0, "adapter", "k_proj")))
    assert not torch.equal(first, torch.rand(3, generator=generator(1, "adapter", "q_proj")))
    assert derive(0, "step", 12) != derive(0, "step", 1, 2)
