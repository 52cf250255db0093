"""Checkpoints that were quantised by bitsandbytes and saved by transformers."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lite.data.settings import Data
from qlora_lite.export.merge import MergedWeights
from qlora_lite.export.trained_layers import MergeSource, TrainedLayers
from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.base_files import BaseFiles
from qlora_lite.model.facts import read_facts
from qlora_lite.model.frozen import FrozenLinear
from qlora_lite.model.load import load_base
from qlora_lite.model.prequantised import is_skipped
from qlora_lite.model.quant import FP4, NF4, Int8
from qlora_lite.model.settings import Base
from qlora_lite.recipe import Recipe
from qlora_lite.run.planning import plan_recipe
from tests.tiny import save_tiny, tiny_tokenizer

CPU = choose("cpu")


def bitsandbytes_config(quant) -> BitsAndBytesConfig:
    if isinstance(quant, Int8):
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.kind,
        bnb_4bit_use_double_quant=quant.double_quant,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quant", [NF4(), NF4(double_quant=False), FP4(), Int8()], ids=str)
def test_the_loaded_model_equals_one_quantised_here(tmp_path, quant, family):
    original = save_tiny(tmp_path / "original", family, num_shards=2)
    theirs = AutoModelForCausalLM.from_pretrained(
        original, quantization_config=bitsandbytes_config(quant)
    )
    theirs.save_pretrained(tmp_path / "quantised")
    loaded = load_base(Base(model=str(tmp_path / "quantised"), quant=quant), CPU)
    assert loaded.quant == quant
    assert not hasattr(loaded.config, "quantization_config")
    here = load_base(Base(model=str(original), quant=quant), CPU).model
    stored = loaded.model.state_dict()
    for name, expected in here.state_dict().items():
        # the quantisation constants are stored as JSON with all their digits
        assert torch.equal(stored[name], expected), name
    ids = torch.arange(20)[None]
    assert_close(loaded.model(ids).logits, here(ids).logits, atol=0, rtol=0)


def test_a_quantised_checkpoint_has_no_original_weight(tmp_path, tiny_llama):
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=bitsandbytes_config(NF4())
    )
    theirs.save_pretrained(tmp_path / "quantised")
    model = load_base(Base(model=str(tmp_path / "quantised")), CPU).model
    assert model.model.layers[0].mlp.up_proj.original() is None


def test_another_quantisation_than_the_stored_one_is_refused(tmp_path, tiny_llama):
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=bitsandbytes_config(NF4())
    )
    theirs.save_pretrained(tmp_path / "quantised")
    with pytest.raises(BaseModelError, match=r"base\.quant=int8.*quantised to nf4"):
        load_base(Base(model=str(tmp_path / "quantised"), quant=Int8()), CPU)


@pytest.fixture(scope="module")
def partly_quantised(tmp_path_factory):
    """A checkpoint in bf16 whose keys and first MLP are left out of its NF4 quantisation."""
    folder = tmp_path_factory.mktemp("skipping")
    original = save_tiny(folder / "original", dtype=torch.bfloat16)
    skipped = ["lm_head", "k_proj", "model.layers.0.mlp"]
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped
    )
    theirs = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    theirs.save_pretrained(folder / "quantised")
    tiny_tokenizer().save_pretrained(folder / "quantised")
    return folder / "quantised"


SKIPPED = {
    *(f"model.layers.{i}.self_attn.k_proj" for i in range(2)),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
}


def test_layers_that_a_checkpoint_left_unquantised_stay_as_stored(partly_quantised):
    model = load_base(Base(model=str(partly_quantised), quant=NF4(double_quant=False)), CPU).model
    stored = load_file(partly_quantised / "model.safetensors")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
    plain = {path for path, layer in layers.items() if layer.weight.dtype == torch.bfloat16}
    assert plain - {"lm_head"} == SKIPPED
    for path in plain - {"lm_head"}:
        assert torch.equal(layers[path].weight, stored[f"{path}.weight"])
        assert torch.equal(layers[path].dense(), stored[f"{path}.weight"].float())


def test_a_plan_counts_them_as_they_are(partly_quantised):
    recipe = Recipe(
        base=Base(model=str(partly_quantised), quant=NF4(double_quant=False)),
        data=Data(train="rows.jsonl"),
        output="out",
        budget="10GiB",
        device="cpu",
    )
    terms = {name: num_bytes for name, num_bytes, _ in plan_recipe(recipe).rows()}
    weights = load_file(partly_quantised / "model.safetensors")
    held = sum(weights[f"{path}.weight"].nbytes for path in SKIPPED)
    assert terms["linear layers that stay unquantised"] == held
    packed = sum(t.nbytes for n, t in weights.items() if n.endswith(("proj.weight", ".absmax")))
    assert terms["linear layers in nf4"] == packed - held


def test_a_merge_leaves_them_as_stored(partly_quantised):
    base = Base(model=str(partly_quantised), quant=NF4(double_quant=False))
    adapter, facts = LoRA(rank=2, targets=["q_proj"]), read_facts(base)
    state = {
        f"model.layers.{i}.self_attn.q_proj.{name}": torch.zeros(shape)
        for i in range(2)
        for name, shape in (("a", (2, 64)), ("b", (64, 2)))
    }
    source = MergeSource(base, facts, BaseFiles.of(partly_quantised), CPU, adapter, state, 0)
    weights = MergedWeights(TrainedLayers(source, "trained"))
    stored = load_file(partly_quantised / "model.safetensors")
    for path in SKIPPED:
        assert torch.equal(weights.tensor(f"{path}.weight"), stored[f"{path}.weight"])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.0.self_attn.k_proj", True),
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.10.mlp.up_proj", False),
        ("model.layers.1.self_attn.qk_proj", False),
    ],
)
def test_a_skip_list_names_whole_parts_of_a_path(path, expected):
    assert is_skipped(path, ["k_proj", "layers.0.mlp"]) is expected
