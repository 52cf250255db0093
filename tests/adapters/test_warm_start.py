"""Starting from an adapter: the same logits, from PEFT's pairs and from the native state."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite.adapters.warm_start import describe_warm_start, require_adapter, warm_start
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.dora import DoRA
from qlora_lite.methods.lora import LoRA
from tests.dense_twin import base_twin
from tests.tiny import save_tiny
from tests.workbench import CLOSE, Bench, perturbed, plain_logits


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def directory(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / request.param, request.param)


def perturbed_by_peft(twin, **options):
    theirs = peft.get_peft_model(twin, peft.LoraConfig(r=4, lora_alpha=5, **options))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05, generator=draw)
    return theirs


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"0": 2}}], ids=str)
def test_starting_from_pefts_lora_gives_the_same_logits(tmp_path, directory, options):
    names = ["c_attn", "c_fc"] if directory.name == "gpt2" else ["q_proj", "down_proj"]
    if "rank_pattern" in options:
        options = {"rank_pattern": {names[0]: 2}, "alpha_pattern": {names[1]: 7}}
    theirs = perturbed_by_peft(base_twin(directory), target_modules=names, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Bench(directory, LoRA(rank=4, targets=names))
    warm_start(ours.attached, tmp_path / "theirs")
    torch.testing.assert_close(ours.logits(), plain_logits(theirs), **CLOSE)


def test_starting_from_pefts_dora_gives_the_same_logits(tmp_path, directory):
    names = ["c_attn", "c_fc"] if directory.name == "gpt2" else ["q_proj", "down_proj"]
    theirs = perturbed_by_peft(base_twin(directory), target_modules=names, use_dora=True)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "magnitude" in name:
                p.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Bench(directory, DoRA(rank=4, targets=names))
    warm_start(ours.attached, tmp_path / "theirs")
    torch.testing.assert_close(ours.logits(), plain_logits(theirs), **CLOSE)
    with pytest.raises(AdapterError, match=r"is a DoRA.*Use adapter=dora"):
        warm_start(Bench(directory, LoRA(rank=4, targets=names)).attached, tmp_path / "theirs")


def test_the_kind_of_a_layer_decides_its_layout_not_the_config_as_in_peft(tmp_path, directory):
    """The matrices of attention are square: they would also fit when transposed."""
    is_gpt2 = directory.name == "gpt2"
    names = ["c_proj"] if is_gpt2 else ["q_proj"]
    theirs = perturbed_by_peft(base_twin(directory), target_modules=names)
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["fan_in_fan_out"] is is_gpt2
    path.write_text(json.dumps(config | {"fan_in_fan_out": not is_gpt2}))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        read_again = peft.PeftModel.from_pretrained(base_twin(directory), tmp_path / "theirs")
    ours = Bench(directory, LoRA(rank=4, targets=names))
    warm_start(ours.attached, tmp_path / "theirs")
    torch.testing.assert_close(ours.logits(), plain_logits(read_again), **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        LoRA(rank=4, ranks={"0": 8, "1": 0}, train_norms=True),
        LoRA(rank=4, embedding_rank=2, train_modules=["lm_head"], targets="mlp"),
    ],
    ids=["ranks-norms", "embedding-head"],
)
def test_starting_from_the_native_state_gives_the_same_bits(tmp_path, directory, settings):
    first = perturbed(directory, settings)
    folder = first.save(tmp_path / "adapter")
    second = Bench(directory, settings, dtype=torch.bfloat16)
    warm_start(second.attached, folder)
    assert torch.equal(second.logits(), first.logits())


def test_a_fully_trained_matrix_is_stored_in_the_layout_of_its_base(tmp_path):
    """GPT-2's output projection is square, so only the numbers show whether it is transposed."""
    directory = save_tiny(tmp_path / "gpt2", "gpt2")
    settings = LoRA(rank=4, train_modules=["*.0.attn.c_proj"])
    first = perturbed(directory, settings)
    folder = first.save(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base_twin(directory), folder)
    torch.testing.assert_close(plain_logits(theirs), first.logits(), **CLOSE)
    theirs.save_pretrained(tmp_path / "theirs")
    second = Bench(directory, settings)
    warm_start(second.attached, tmp_path / "theirs")
    torch.testing.assert_close(second.logits(), first.logits(), **CLOSE)


def test_a_tensor_that_the_recipe_does_not_train_is_an_error(tmp_path, directory):
    folder = perturbed(directory, LoRA(rank=4)).save(tmp_path / "adapter")
    narrower = Bench(directory, LoRA(rank=4, targets="attention"))
    with pytest.raises(AdapterError, match=r"tensors that this recipe does not train.*targets"):
        warm_start(narrower.attached, folder)
    with pytest.raises(AdapterError, match="differ in"):
        narrower.attached.load_state(load_file(folder / "native.safetensors"))


def test_an_adapter_of_larger_rank_is_an_error_with_the_needed_rank(tmp_path, directory):
    folder = perturbed(directory, LoRA(rank=8)).save(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"adapter\.rank=8"):
        warm_start(Bench(directory, LoRA(rank=4)).attached, folder)


def test_an_adapter_of_another_base_is_an_error(tmp_path, directory):
    folder = perturbed(directory, LoRA(rank=4)).save(tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(n for n in tensors if n.endswith("lora_A.weight"))
    tensors[name] = torch.zeros(4, 17)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "native.safetensors").unlink()
    with pytest.raises(
        AdapterError, match=r"adapter_model\.safetensors changed since it was written"
    ):
        warm_start(Bench(directory, LoRA(rank=4)).attached, folder)
    (folder / "qlora_lite.json").unlink()
    with pytest.raises(AdapterError, match="another base model"):
        warm_start(Bench(directory, LoRA(rank=4)).attached, folder)


def test_a_directory_without_an_adapter_is_an_error_before_the_base_is_read(tmp_path):
    with pytest.raises(AdapterError, match=r"not an adapter directory"):
        require_adapter(tmp_path)
    (tmp_path / "native.safetensors").write_bytes(b"")
    require_adapter(tmp_path)


def test_notes_name_the_file_and_the_other_base(tmp_path, tiny_llama):
    folder = perturbed(tiny_llama, LoRA(rank=4)).save(tmp_path / "adapter")
    own, other = LoRA(rank=4, dropout=0.1), LoRA(rank=6)
    assert describe_warm_start(folder, own, str(tiny_llama)) == [
        f"starting from {folder / 'native.safetensors'}"
    ]
    notes = describe_warm_start(folder, other, "Qwen/Qwen3-8B")
    assert notes[0] == f"starting from {folder / 'adapter_model.safetensors'}"
    assert "made for the base" in notes[1]
    assert notes[1].endswith("and this run's is Qwen/Qwen3-8B")


@pytest.mark.parametrize("sidecar", [None, "{", "[]", "{}"])
def test_a_native_state_without_readable_settings_is_refused(tmp_path, tiny_llama, sidecar):
    folder = perturbed(tiny_llama, LoRA(rank=4)).save(tmp_path / "adapter")
    (folder / "qlora_lite.json").unlink()
    if sidecar is not None:
        (folder / "qlora_lite.json").write_text(sidecar)
    with pytest.raises(AdapterError, match=r"qlora_lite\.json cannot be read.*Copy"):
        warm_start(Bench(tiny_llama, LoRA(rank=4)).attached, folder)


def test_zero_padding_of_an_adapter_does_not_become_dead_components(tmp_path):
    directory = save_tiny(tmp_path / "base")
    first = Bench(directory, LoRA(rank=6, ranks={"0": 2}, embedding_rank=2), lr=1e-2)
    first.step()
    folder = first.save(tmp_path / "adapter")
    second = Bench(directory, LoRA(rank=6, embedding_rank=2))
    warm_start(second.attached, folder)
    torch.testing.assert_close(second.logits(), first.logits(), **CLOSE)
    second.step()
    assert all(layer.b.any(dim=0).all() for layer in second.attached.layers.values())
    same_ranks = Bench(directory, LoRA(rank=6, ranks={"0": 2}, alpha=9, embedding_rank=2))
    warm_start(same_ranks.attached, folder)
    torch.testing.assert_close(same_ranks.logits(), first.logits(), **CLOSE)


def test_the_base_head_in_pefts_files_must_equal_ours(tmp_path):
    directory = save_tiny(tmp_path / "base")
    twin = base_twin(directory)
    twin.save_pretrained(tmp_path / "plain")
    names = ["q_proj", "lm_head"]
    theirs = perturbed_by_peft(twin, target_modules=names)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in stored
    ours = Bench(directory, LoRA(rank=4, targets=names))
    warm_start(ours.attached, tmp_path / "theirs")
    torch.testing.assert_close(ours.logits(), plain_logits(theirs), **CLOSE)
    stored["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(stored, tmp_path / "theirs" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="contains another weight for lm_head"):
        warm_start(ours.attached, tmp_path / "theirs")
