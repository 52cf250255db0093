"""The memory plan of a recipe, and checks of settings that depend on each other."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qlora_lite.foundation import device
from qlora_lite.foundation.errors import (
    AdapterError,
    BaseModelError,
    BudgetError,
    DataError,
    RecipeError,
    RunError,
)
from qlora_lite.model.facts import facts_of, read_facts
from qlora_lite.model.load import build_empty
from qlora_lite.model.settings import Base
from qlora_lite.model.targets import select
from qlora_lite.run.planning import check_settings, plan_recipe, tokens_of_a_step
from qlora_lite.run.setup import set_up
from tests.end_to_end.small_run import recipe_in, small_recipe
from tests.families import tiny_config, tiny_of
from tests.tiny import save_tiny, tiny_tokenizer

CPU = device.choose("cpu")
BIN = "optim.tokens_per_step=1024"
"""At least one bin of the longest rows here."""


def notes_of(folder, *changes, base="base"):
    return check_settings(set_up(recipe_in(folder, "run", *changes, base=base), CPU))


def test_a_teacher_is_one_more_forward_of_the_base_in_the_plan(folder):
    without = plan_recipe(recipe_in(folder, "run", "adapter.rank=4"))
    with_teacher = plan_recipe(recipe_in(folder, "run", "adapter=ba_lora", "adapter.rank=4"))
    tokens = 128
    base = Base(model=str(folder / "base"))
    model = build_empty(read_facts(base).config, base)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.int64, device="meta"))
    # the counter counts all of the attention matrix, and causal attention needs half of it
    config = model.config
    square = 4 * tokens * config.hidden_size * config.num_hidden_layers
    forward = counter.get_total_flops() / tokens - square / 2
    difference = with_teacher.flops_per_token - without.flops_per_token
    assert difference == pytest.approx(forward, rel=0.01)


def test_a_plan_for_a_card_that_is_not_here_needs_a_budget(folder):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA card")
    with pytest.raises(BudgetError, match=r'without a CUDA card.*budget="22GiB"'):
        plan_recipe(recipe_in(folder, "run", "device=cuda"))
    assert plan_recipe(recipe_in(folder, "run", "device=cuda", "budget=4GiB")).fits


@pytest.mark.parametrize("setting", ["data.train", "data.heldout"])
def test_a_folder_as_data_is_refused_and_a_file_that_is_not_here_is_not(folder, setting):
    with pytest.raises(DataError, match=rf"got {setting}=.*a folder, not a file"):
        notes_of(folder, f"{setting}={folder}", BIN)
    assert notes_of(folder, f"{setting}={folder}/not_here.jsonl", BIN) == []


def test_an_output_that_cannot_be_a_folder_is_refused(folder):
    for output in ("/dev/null", f"{folder}/train.jsonl/run"):
        with pytest.raises(RunError, match=r"is a file, and a folder is needed.*output="):
            notes_of(folder, f"output={output}", BIN)
    assert notes_of(folder, f"output={folder}/new/run", BIN) == []


def test_flash_attention_is_refused_where_it_cannot_run(folder):
    flash = "base.attention=flash_attention_2"
    with pytest.raises(RecipeError, match=r"got base\.attention=flash_attention_2, and FlashAtt"):
        notes_of(folder, flash, BIN)
    absent = device.choose("cuda", allow_absent=True)
    if not absent.is_available:  # a plan for another machine
        assert check_settings(set_up(recipe_in(folder, "run", flash, BIN), absent)) == []


def test_a_step_of_packed_rows_has_at_least_one_bin(folder):
    short = ("optim.tokens_per_step=1", "data.max_tokens=64")
    assert tokens_of_a_step(recipe_in(folder, "run", *short)) == 64
    assert tokens_of_a_step(recipe_in(folder, "run", *short, "data.packing=false")) == 1
    assert tokens_of_a_step(recipe_in(folder, "run", BIN, "data.max_tokens=64")) == 1024


def test_rows_longer_than_learned_positions_are_refused(folder):
    save_tiny(folder / "gpt2", "gpt2", tied=True)
    assert notes_of(folder, "data.max_tokens=512", BIN, base="gpt2") == []
    with pytest.raises(RecipeError, match=r"512 positions.*learned.*max_tokens=512"):
        notes_of(folder, "data.max_tokens=513", base="gpt2")


def test_rows_longer_than_the_context_of_rotary_positions_are_noted(folder):
    (note,) = notes_of(folder, "data.max_tokens=513", BIN)
    assert note.startswith("data.max_tokens=513, and ")
    assert "trained on 512 positions" in note
    assert notes_of(folder, "data.max_tokens=512", BIN) == []


def test_ranks_that_have_no_effect_are_noted(folder):
    (note,) = notes_of(folder, 'adapter.ranks={"0-9": 2}')
    assert note.startswith("adapter.ranks: '0-9' includes blocks beyond the last one")
    assert note.endswith("which is 1")
    # k_proj is (32, 64), with 2 heads of 16 for 4 of queries
    (note,) = notes_of(folder, "adapter.rank=33", 'adapter.targets=["k_proj", "q_proj"]')
    assert note.startswith("adapter.rank=33 is more than the full rank of 2 layers")
    assert "k_proj: 32)" in note


def test_patience_without_held_out_rows_is_noted(folder):
    changes = ("evaluation.patience=2", "data.heldout_share=0")
    assert notes_of(folder, *changes) == [
        "evaluation.patience has no effect: no rows are held out to score"
    ]


def test_a_tied_head_cannot_be_quantised(folder):
    save_tiny(folder / "tied", tied=True)
    with pytest.raises(BaseModelError, match=r"got base\.head=nf4, .* is tied to its embedding"):
        notes_of(folder, "base.head=nf4", base="tied")
    assert notes_of(folder, base="tied") == []
    assert notes_of(folder, "base.head=nf4") == []


def test_a_method_that_changes_the_base_is_noted(folder):
    (note,) = notes_of(folder, "adapter=loftq")
    assert note.startswith("adapter=loftq with these settings changes the base weights")


def test_experts_that_stay_unquantised_are_noted_with_their_bytes(folder, tmp_path):
    base = save_tiny(tmp_path / "base", "mixtral")
    shutil.copy(folder / "train.jsonl", tmp_path)
    (note,) = notes_of(tmp_path)
    # 2 layers with 4 experts of 3 matrices (64, 128) in fp32; NF4: a code and a scale of 64 weights
    assert f"the experts of {base} stay in float32, without adapters: 196,608 weights" in note
    assert "768 KiB. In nf4 they would take 99" in note
    assert notes_of(tmp_path, "base.quant=bf16") == []


def test_a_loss_of_the_routers_is_noted(folder, tmp_path):
    tiny_of("mixtral", output_router_logits=True).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    shutil.copy(folder / "train.jsonl", tmp_path)
    (note,) = notes_of(tmp_path, "base.quant=bf16")
    assert "output_router_logits=true" in note


def test_a_plan_refuses_what_training_refuses(folder, tmp_path):
    base = shutil.copytree(folder / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, base / "model.safetensors")
    with pytest.raises(BaseModelError, match=rf"{name} is torch\.float8_e4m3fn"):
        check_settings(set_up(small_recipe(base, folder / "train.jsonl", tmp_path / "r"), CPU))
    renamed = {name.replace("mlp", "ffn"): tensor for name, tensor in tensors.items()}
    save_file(renamed, base / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"has other names.*cannot load it either"):
        check_settings(set_up(small_recipe(base, folder / "train.jsonl", tmp_path / "r"), CPU))


def test_a_step_of_less_than_one_bin_is_noted(folder):
    (note,) = notes_of(folder, "optim.tokens_per_step=1")
    assert note.startswith("optim.tokens_per_step=1 is less than one bin")


def test_the_linear_layers_of_falcon_are_found():
    config = CONFIG_MAPPING["falcon"](
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    facts = facts_of(config)
    assert len(select(facts.specs, "all-linear")) == 4


def test_a_target_is_not_suggested_for_itself(folder):
    specs = [s for s in read_facts(Base(model=str(folder / "base"))).specs if s.kind == "head"]
    with pytest.raises(AdapterError) as error:
        select(specs, "all-linear")
    assert "Did you mean 'all-linear'" not in str(error.value)


def test_falcons_linear_layer_computes_what_nn_linear_does():
    from transformers.models.falcon.modeling_falcon import FalconLinear

    theirs, plain, x = FalconLinear(5, 3), torch.nn.Linear(5, 3), torch.randn(2, 5)
    plain.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(theirs(x), plain(x))


def test_a_layout_that_training_refuses_is_refused_before_it_is_downloaded(folder):
    setup = set_up(
        recipe_in(folder, "run", "base.model=someone/model"),
        CPU,
        facts=facts_of(tiny_config("hrm_text")),
    )
    with pytest.raises(BaseModelError, match=r"another layout .*not supported"):
        check_settings(setup)
