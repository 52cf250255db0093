"""An adapter's native state: all tensors of its layers, bit for bit."""

import pytest
import torch

from qlora_lite.adapters.files import read_native
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.lora import LoRA
from tests.adapters.test_peft import SETTINGS
from tests.workbench import Bench, perturbed


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.ranks}-{s.targets}")
def test_the_native_state_is_restored_bit_for_bit(tmp_path, tiny_llama, settings):
    first = perturbed(tiny_llama, settings)
    second = Bench(tiny_llama, settings, dtype=torch.bfloat16)
    second.attached.load_state(read_native(first.save(tmp_path / "adapter")))
    assert torch.equal(second.logits(), first.logits())


def test_a_damaged_native_state_is_an_error_with_a_way_out(tmp_path, tiny_llama):
    folder = perturbed(tiny_llama, LoRA(rank=4)).save(tmp_path / "adapter")
    state = (folder / "native.safetensors").read_bytes()
    for damaged in (b"", state[:100], state[:-1]):
        (folder / "native.safetensors").write_bytes(damaged)
        with pytest.raises(AdapterError, match=r"cannot be read.*Restore it$"):
            read_native(folder)
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    with pytest.raises(AdapterError, match=r"or delete .*last checkpoint"):
        read_native(folder)
    (folder / "native.safetensors").unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        read_native(folder)
