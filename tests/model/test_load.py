"""A loaded base against transformers' model of the same directory."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.base_files import locate
from qlora_lite.model.frozen import FrozenEmbedding, FrozenLinear
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8
from qlora_lite.model.settings import Base
from qlora_lite.model.tokenizer import load_tokenizer
from tests.tiny import FAMILIES, VOCABULARY, save_tiny

CPU = choose("cpu")
IDS = torch.arange(3, 43)[None]


def load(directory: Path, **settings):
    return load_base(Base(model=str(directory), **settings), CPU)


def frozen_layers(model: nn.Module) -> dict[str, FrozenLinear | FrozenEmbedding]:
    kinds = (FrozenLinear, FrozenEmbedding)
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds)}


def transformers_model_of(loaded, directory: Path):
    """transformers' model in fp32, with the dequantised weights."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for path, layer in frozen_layers(loaded.model).items():
        module, dense = model.get_submodule(path), layer.dense()
        module.weight.data.copy_(dense.T if isinstance(module, Conv1D) else dense)
    return model


CASES = [
    (family, quant, False) for family in ("llama", "gpt2") for quant in (Int8(), BF16(), FP32())
]
CASES += [(family, NF4(), False) for family in FAMILIES]
CASES += [(family, NF4(), True) for family in ("llama", "gpt2", "gemma3_text")]


@pytest.mark.parametrize(("family", "quant", "tied"), CASES, ids=str)
def test_logits_are_those_of_transformers_with_the_dequantised_weights(
    tmp_path, family, quant, tied
):
    directory = save_tiny(tmp_path / "m", family, tied=tied, num_shards=2)
    loaded = load(directory, quant=quant)
    with torch.no_grad():
        expected = transformers_model_of(loaded, directory)(IDS).logits
        assert_close(loaded.model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_in_fp32_the_logits_are_those_of_the_model(tiny_llama):
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama)(IDS).logits
        assert_close(load(tiny_llama, quant=FP32()).model(IDS).logits, expected)


@pytest.mark.parametrize(
    ("family", "kind", "double_quant", "dtype"),
    [
        ("llama", NF4, True, torch.bfloat16),
        ("llama", FP4, False, torch.float16),
        ("gpt2", NF4, False, torch.float32),
        ("gpt2", FP4, True, torch.bfloat16),
    ],
    ids=str,
)
def test_4bit_weights_are_those_of_transformers_bit_for_bit(
    tmp_path, family, kind, double_quant, dtype
):
    directory = save_tiny(tmp_path / "m", family, dtype=dtype)
    quant = kind(double_quant=double_quant)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.kind,
        bnb_4bit_use_double_quant=double_quant,
    )
    # compared before any forward: some processors repack bitsandbytes' weights in it
    theirs = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    ours = load(directory, quant=quant).model
    layers = [path for path, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == {"llama": 14, "gpt2": 8}[family]
    for path in layers:
        expected, found = theirs.get_submodule(path).weight, ours.get_submodule(path)
        assert torch.equal(found.weight, expected.data)
        assert torch.equal(found.scales, expected.quant_state.absmax)
        if double_quant:
            assert torch.equal(found.nested_scales, expected.quant_state.state2.absmax)
            assert torch.equal(found.offset, expected.quant_state.offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_int8_weights_are_those_of_transformers_bit_for_bit(tmp_path, family, dtype):
    directory = save_tiny(tmp_path / "m", family, dtype=dtype)
    config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    ours = load(directory, quant=Int8()).model
    layers = [path for path, m in theirs.named_modules() if type(m).__name__ == "Linear8bitLt"]
    assert layers
    for path in layers:
        expected, found = theirs.get_submodule(path).weight, ours.get_submodule(path)
        assert torch.equal(found.weight, expected.data)
        assert torch.equal(found.scales, expected.SCB)


def test_every_parameter_is_frozen_in_its_dtype(tiny_llama):
    model = load(tiny_llama).model
    assert not model.training
    assert not [name for name, p in model.named_parameters() if p.requires_grad or p.is_meta]
    assert not [name for name, b in model.named_buffers() if b.is_meta]
    dtypes = {name: p.dtype for name, p in model.named_parameters() if ".1." not in name}
    linears = [f"self_attn.{n}_proj" for n in "qkvo"] + [
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    assert dtypes == {
        "model.embed_tokens.weight": torch.bfloat16,
        **{f"model.layers.0.{path}.weight": torch.uint8 for path in linears},
        "model.layers.0.input_layernorm.weight": torch.float32,
        "model.layers.0.post_attention_layernorm.weight": torch.float32,
        "model.norm.weight": torch.float32,
        "lm_head.weight": torch.bfloat16,
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_buffers_have_their_values(tmp_path, family):
    directory = save_tiny(tmp_path / "m", family)
    theirs = dict(AutoModelForCausalLM.from_pretrained(directory).named_buffers())
    ours = dict(load(directory, quant=FP32()).model.named_buffers())
    compared = [name for name in theirs if name in ours]
    assert compared or family == "gpt2"
    for name in compared:
        assert torch.equal(ours[name], theirs[name])


def test_a_tied_head_shares_the_storage_of_the_embedding(tiny_tied_llama, tiny_gpt2):
    for directory in (tiny_tied_llama, tiny_gpt2):
        model = load(directory).model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight is embedding.weight


@pytest.mark.parametrize(("head", "kind"), [("int8", "int8"), ("nf4", "nf4"), ("16bit", "bf16")])
def test_an_untied_head_is_quantised_as_set(tiny_llama, head, kind):
    assert load(tiny_llama, head=head).model.lm_head.quant.kind == kind


def test_a_tied_head_cannot_be_quantised(tiny_tied_llama):
    with pytest.raises(BaseModelError, match=r"base\.head=int8.*tied to its embedding"):
        load(tiny_tied_llama, head="int8")


def test_original_is_the_tensor_of_the_checkpoint(tiny_gpt2):
    stored = load_file(tiny_gpt2 / "model.safetensors")
    model = load(tiny_gpt2).model
    layer = model.transformer.h[1].mlp.c_fc
    assert torch.equal(layer.original(), stored["transformer.h.1.mlp.c_fc.weight"].T)
    assert torch.equal(layer.bias, stored["transformer.h.1.mlp.c_fc.bias"])
    assert torch.equal(model.transformer.wte.original(), stored["transformer.wte.weight"])


def test_hub_gpt2_has_no_prefix_and_old_buffers(tmp_path, tiny_gpt2):
    directory = Path(shutil.copytree(tiny_gpt2, tmp_path / "m"))
    file = directory / "model.safetensors"
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, file)
    with torch.no_grad():
        found, expected = (load(path).model(IDS).logits for path in (directory, tiny_gpt2))
    assert torch.equal(found, expected)


def test_shards_do_not_change_the_result(tmp_path):
    one, five = (load(save_tiny(tmp_path / str(n), "qwen3", num_shards=n)).model for n in (1, 5))
    for (name, found), expected in zip(
        five.state_dict().items(), one.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name


def test_progress_counts_all_bytes(tiny_llama):
    seen = []
    loaded = load_base(Base(model=str(tiny_llama)), CPU, progress=lambda *p: seen.append(p))
    assert seen == sorted(seen)
    assert seen[-1] == (loaded.checkpoint.num_bytes, loaded.checkpoint.num_bytes)


@pytest.mark.parametrize("family", ["mixtral", "qwen2", "gpt2"])
def test_a_module_is_announced_once_with_all_of_its_values(tmp_path, family):
    """So that they can be moved away: nothing is written into it afterwards."""
    base = Base(model=str(save_tiny(tmp_path / "base", family)), quant=FP32())
    values: dict[nn.Parameter, torch.Tensor] = {}

    def move_away(module):
        for parameter in module.parameters():
            values[parameter] = values.get(parameter, parameter.data)
            parameter.data = torch.empty(0)

    model = load_base(base, choose("cpu", "fp32"), installed=move_away).model
    expected = load_base(base, choose("cpu", "fp32")).model
    for name, parameter in model.named_parameters():
        assert_close(values[parameter], expected.get_parameter(name), rtol=0, atol=0)


def test_a_split_is_applied_to_its_layers_and_not_to_the_head(tiny_llama):
    seen = []

    def split(dense, round_trip):
        seen.append(dense)
        return torch.zeros_like(dense)

    def split_of(path):
        return None if path.endswith("q_proj") else split

    model = load_base(Base(model=str(tiny_llama)), CPU, split=split_of).model
    assert len(seen) == 12
    assert not model.model.layers[0].mlp.up_proj.dense().any()
    assert model.model.layers[0].self_attn.q_proj.dense().any()
    assert model.lm_head.dense().any()


def test_the_model_can_generate(tiny_llama):
    model = load(tiny_llama).model
    found = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=2)
    step = IDS
    for _ in range(5):
        with torch.no_grad():
            step = torch.cat([step, model(step).logits[:, -1:].argmax(-1)], dim=1)
    assert found.tolist() == step[:, : found.shape[1]].tolist()


def test_the_tokenizer_is_that_of_the_model(tiny_llama):
    tokenizer = load_tokenizer(Base(model=str(tiny_llama)))
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.chat_template


def test_the_checkpoint_is_closed_after_loading(tiny_llama):
    loaded = load(tiny_llama)
    gc.collect()
    assert str(tiny_llama) not in Path("/proc/self/maps").read_text()
    assert loaded.model.lm_head.original() is not None


# refused checkpoints, and the error messages


def edited(tmp_path: Path, source: Path, **config) -> Path:
    """A copy of a model with another config."""
    directory = Path(shutil.copytree(source, tmp_path / "edited"))
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


def test_a_missing_tensor_is_named(tmp_path, tiny_llama):
    directory = edited(tmp_path, tiny_llama, num_hidden_layers=3)
    with pytest.raises(BaseModelError, match=r"has no model\.layers\.2\."):
        load(directory)


def test_an_extra_tensor_is_named(tmp_path, tiny_llama):
    directory = edited(tmp_path, tiny_llama, num_hidden_layers=1)
    with pytest.raises(BaseModelError, match=r"holds model\.layers\.1\."):
        load(directory)


def test_a_shape_of_another_model_is_named(tmp_path, tiny_llama):
    directory = edited(tmp_path, tiny_llama, intermediate_size=96)
    with pytest.raises(
        BaseModelError, match=r"mlp\.\w+_proj\.weight has shape \(.*according to config\.json"
    ):
        load(directory)


def test_tied_tensors_that_differ_are_named(tmp_path, tiny_llama):
    directory = edited(tmp_path, tiny_llama, tie_word_embeddings=True)
    with pytest.raises(BaseModelError, match=r"ties lm_head\.weight to .*embed_tokens.*differ"):
        load(directory)


def test_other_quantisation_methods_are_refused(tmp_path, tiny_llama):
    directory = edited(
        tmp_path, tiny_llama, quantization_config={"quant_method": "gptq", "bits": 4}
    )
    with pytest.raises(BaseModelError, match=r"quantised with gptq.*original"):
        load(directory)


def test_a_pickle_is_refused(tmp_path, tiny_llama):
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin"):
        load(directory)


def test_custom_code_of_a_model_runs_only_when_allowed(tmp_path, tiny_llama, monkeypatch):
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    directory = edited(tmp_path, tiny_llama, model_type="own", auto_map=auto_map)
    (directory / "own.py").write_text(OWN_MODEL)
    with pytest.raises(BaseModelError, match=r"base\.trust_remote_code=true"):
        load(directory)
    assert type(load(directory, trust_remote_code=True).model).__name__ == "OwnModel"


OWN_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_an_unknown_hub_id_offline_is_an_error_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseModelError, match=r"no-owner/no-model.*directory of a downloaded model"):
        locate(Base(model="no-owner/no-model"))


def test_a_directory_without_a_tokenizer_is_named(tmp_path, tiny_llama):
    directory = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BaseModelError, match=r"tokenizer\.json"):
        load_tokenizer(Base(model=str(directory)))
