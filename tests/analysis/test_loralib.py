"""State dicts in the layout of loralib, written by hand."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from qlora_lite.analysis.loralib import read_loralib
from qlora_lite.foundation.errors import AdapterError

EXACT = {"atol": 0, "rtol": 0}
FP32 = {"atol": 1e-5, "rtol": 1e-5}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save(file, **tensors):
    torch.save({name.replace("__", "."): value for name, value in tensors.items()}, file)
    return file


def test_a_linear_layer_is_one_pair_without_its_scale(tmp_path):
    a, b = random(4, 30), random(20, 4)
    file = save(tmp_path / "lora.pt", h__0__fc__lora_A=a, h__0__fc__lora_B=b, h__0__fc__bias=b)
    (pair,) = read_loralib(file)
    assert pair.name == pair.path == "h.0.fc"
    assert_close(pair.factors.down, a, **EXACT)
    assert_close(pair.factors.up, b, **EXACT)


def test_alpha_gives_the_scale(tmp_path):
    a, b = random(4, 30), random(20, 4)
    (pair,) = read_loralib(save(tmp_path / "lora.pt", fc__lora_A=a, fc__lora_B=b), alpha=32)
    assert_close(pair.factors.up @ pair.factors.down, 8 * b @ a, **FP32)


@pytest.mark.parametrize("num_parts", [2, 3])
def test_a_merged_layer_is_a_pair_for_each_part(tmp_path, num_parts):
    a, b = random(num_parts * 4, 30), random(num_parts * 20, 4)
    pairs = read_loralib(save(tmp_path / "lora.bin", qkv__lora_A=a, qkv__lora_B=b))
    assert [pair.name for pair in pairs] == [f"qkv[{part}]" for part in range(num_parts)]
    # loralib's own expression for the delta
    expected = F.conv1d(a[None], b[..., None], groups=num_parts)[0]
    found = torch.cat([pair.factors.up @ pair.factors.down for pair in pairs])
    assert_close(found, expected, **FP32)


def test_checkpoints_of_the_paper_are_unwrapped(tmp_path):
    state = {"fc.lora_A": random(4, 30), "fc.lora_B": random(20, 4)}
    torch.save({"model_state_dict": state, "step": 3}, tmp_path / "model.pt")
    assert [pair.path for pair in read_loralib(tmp_path / "model.pt")] == ["fc"]


def test_half_precision_is_read_as_fp32(tmp_path):
    file = save(tmp_path / "l.pt", fc__lora_A=random(2, 6).half(), fc__lora_B=random(4, 2).half())
    assert read_loralib(file)[0].factors.up.dtype == torch.float32


class Dangerous:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("code of the file was run",)


@pytest.mark.parametrize("cut", [0, 10, 700])
def test_a_damaged_file_is_named(tmp_path, cut):
    file = save(tmp_path / "lora.pt", fc__lora_A=random(4, 30), fc__lora_B=random(20, 4))
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(AdapterError, match=r"lora\.pt cannot be read"):
        read_loralib(file)


def test_a_text_file_is_refused(tmp_path):
    (tmp_path / "lora.bin").write_text("hello world")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_loralib(tmp_path / "lora.bin")


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    torch.save({"fc.lora_A": Dangerous()}, tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match="not run"):
        read_loralib(tmp_path / "lora.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [{"fc.weight": torch.ones(2, 2)}, [torch.ones(2)], {}])
def test_a_file_without_factors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match="is not a loralib checkpoint"):
        read_loralib(tmp_path / "lora.pt")


def test_half_a_pair_is_refused(tmp_path):
    file = save(tmp_path / "lora.pt", fc__lora_A=random(4, 30))
    with pytest.raises(AdapterError, match="only lora_A of fc"):
        read_loralib(file)


@pytest.mark.parametrize(
    ("a", "b"), [((6, 30), (20, 4)), ((8, 30), (21, 4)), ((4, 30, 1), (20, 4)), ((0, 30), (20, 4))]
)
def test_factors_that_do_not_fit_are_refused(tmp_path, a, b):
    file = save(tmp_path / "lora.pt", fc__lora_A=random(*a), fc__lora_B=random(*b))
    with pytest.raises(AdapterError, match="fc has lora_A"):
        read_loralib(file)
