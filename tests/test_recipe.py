"""Recipes: overriding settings, and the messages about mistakes."""

import pytest

from qlora_lite.data.settings import Data
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.peer_names import PEER_NAMES
from qlora_lite.foundation.validation_messages import settings_models
from qlora_lite.methods.lora import LoRA
from qlora_lite.methods.rslora import RsLoRA
from qlora_lite.model.quant import NF4, Int8
from qlora_lite.model.settings import Base
from qlora_lite.recipe import Recipe, differences, vary

RECIPE = Recipe(
    base=Base(model="some/model", quant=NF4(block_size=128)),
    adapter=LoRA(rank=8, targets="mlp"),
    data=Data(train="rows.jsonl"),
    output="runs/x",
)


def test_a_variant_overrides_settings_and_is_checked():
    other = RECIPE.but("optim.lr=1e-4", "adapter.rank=32", "budget=22GiB")
    assert other.optim.lr == 1e-4
    assert other.adapter == LoRA(rank=32, targets="mlp")
    assert other.base == RECIPE.base
    assert RECIPE.adapter.rank == 8


def test_another_kind_keeps_shared_settings_and_notes_them():
    other, notes = vary(RECIPE, ["adapter=rslora", "base.quant=int8"])
    assert other.adapter == RsLoRA(rank=8, targets="mlp")
    assert other.base.quant == Int8()
    assert notes == [
        "adapter=rslora: kept rank=8, targets=mlp; the other fields get the defaults of rslora",
        "base.quant=int8: dropped block_size=128, which int8 does not have; the other fields get "
        "the defaults of int8",
    ]


def test_data_fields_may_be_json_text():
    other = RECIPE.but('data.fields={"prompt": "question", "completion": "answer"}')
    assert other.data.fields == {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("adapter.rnk=3", "Did you mean 'rank'"),
        ("adapter=lore", "Did you mean 'lora'"),
        ("base.quant=nf5", "Did you mean 'nf4'"),
        ("optim.schedule=cosin", "Did you mean 'cosine'"),
        ("optim.lr=-1", "optim.lr: got -1"),
        ("budget=plenty", "22GiB"),
        ("adapter.rank=0", "adapter.rank"),
        ("nonsense=1", "nonsense"),
        ("base=gpt2", r"base: got 'gpt2': set its fields instead: base\.model, base\."),
        ("adapter=3", r"adapter: got 3: a kind is needed, adapter=NAME with one of lora, "),
        ('adapter={"rank": 4}', r"a kind is needed, adapter=NAME with one of lora, "),
        ("base.quant=4", r"base\.quant=NAME with one of nf4, fp4"),
        ("tracking=wandbb", r"tracking.*Did you mean 'wandb'"),
        ("optim.betas=0.9", r"optim\.betas: got 0\.9: a list is needed"),
        ("output=1", r"""text is needed. In a shell, type output='"1"'$"""),
        ("data.train=null", r"data\.train: got None: text is needed$"),
        (
            "adapter.targets=3",
            r"^adapter\.targets: got 3: text is needed.*, or a list is needed[^\n]*$",
        ),
        ("data.prompt=[INST] {", r"^data\.prompt: got '\[INST\] \{': (?!.*JSON)"),
        ("data.fields={prompt:question}", r"JSON is needed(?!.*not valid JSON)"),
        ('adapter.ranks={"0": "many"}', r"^adapter\.ranks\.0: got 'many'"),
        ("data.columns=text", r'a list is needed, such as \["a", "b"\]'),
        ("data.fields=question", r"data\.fields: .*JSON is needed"),
        ("adapter.ranks=4", r"an object is needed"),
        ('adapter={"rank": 4', r"not valid JSON: Expecting ',' delimiter"),
        ("optim.betas=[0.9", r"not valid JSON"),
    ],
)
def test_a_mistake_is_reported_with_its_path_and_a_close_match(change, words):
    with pytest.raises(RecipeError, match=words):
        RECIPE.but(change)


def test_every_mistake_has_its_own_line():
    with pytest.raises(RecipeError) as caught:
        RECIPE.but('optim={"lr": -1, "rate": 2, "schedule": "cosin"}', "data.columns=3")
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "data.columns",
        "optim.lr",
        "optim.schedule",
        "optim.rate",
    ]


def test_one_tracker_may_be_given_without_a_list():
    assert RECIPE.but("tracking=wandb").tracking == ["wandb"]
    assert RECIPE.but('tracking=["wandb"]').tracking == ["wandb"]


def test_differences_name_the_path_and_both_values():
    other = RECIPE.but("optim.lr=1e-4", "adapter=rslora")
    found = differences(RECIPE.to_dict(), other.to_dict())
    assert "optim.lr: 0.0002 -> 0.0001" in found
    assert "adapter.kind: 'lora' -> 'rslora'" in found


@pytest.mark.parametrize("value", ["Infinity", "NaN", "-Infinity"])
def test_numbers_are_finite(value):
    with pytest.raises(RecipeError, match=r"optim\.lr: .*finite number"):
        RECIPE.but(f"optim.lr={value}")


def test_a_key_of_data_fields_is_a_field_of_a_format():
    with pytest.raises(
        RecipeError, match=r"'inptu' is not a field of any format. Did you mean 'input'"
    ):
        RECIPE.but('data.fields={"inptu": "context"}')


def test_a_budget_may_be_plain_bytes():
    assert RECIPE.but("budget=800000000").budget == "800000000"


# -- what is given twice, or elsewhere has another name --------------------------------------------


def recipe_of(**optim):
    return Recipe.model_validate(
        {"base": {"model": "a/b"}, "data": {"train": "x.jsonl"}, "optim": optim, "output": "runs/x"}
    )


def test_two_lengths_of_a_run_are_refused():
    with pytest.raises(RecipeError, match=r"optim\.steps=5 and optim\.epochs=2.*Give one"):
        recipe_of().but("optim.steps=5", "optim.epochs=2")
    with pytest.raises(ValueError, match="steps=5 and epochs=2"):
        recipe_of(steps=5, epochs=2)


def test_a_path_may_start_with_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ("base.model", "adapter.start", "output")
    assert RECIPE.but(*(f"{name}=~/{name}" for name in names)) == RECIPE.but(
        *(f"{name}=/home/me/{name}" for name in names)
    )
    assert RECIPE.but("output=runs/~").output == "runs/~"


def test_a_length_on_the_command_line_replaces_that_of_the_recipe():
    longer, notes = vary(recipe_of(epochs=3), ["optim.steps=5"])
    assert (longer.optim.steps, longer.optim.epochs) == (5, 1)
    assert notes == ["optim.steps=5 replaces optim.epochs=3.0 of the recipe"]
    assert longer.but("optim.epochs=2").optim.steps is None
    assert recipe_of(steps=5).but("optim.steps=null", "optim.epochs=2").optim.epochs == 2
    assert Recipe.model_validate(longer.to_dict()) == longer


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["optim.lr=1", "optim.lr=2"], r"optim\.lr is given twice: 1 and 2"),
        (['optim={"lr": 1}', "optim.lr=2"], r"optim\.lr is given twice: alone and in optim"),
    ],
)
def test_a_setting_that_is_given_twice_is_refused(assignments, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of().but(*assignments)


def test_the_order_of_a_kind_and_its_fields_does_not_matter():
    first = recipe_of().but("adapter=sora", "adapter.rank=4")
    assert recipe_of().but("adapter.rank=4", "adapter=sora") == first


def test_settings_that_another_method_does_not_have_are_named():
    dylora = recipe_of().but("adapter=dylora", "adapter.min_rank=2", "adapter.rank=4")
    _, notes = vary(dylora, ["adapter=lora"])
    assert "kept rank=4" in notes[0]
    assert "dropped min_rank=2, which lora does not have" in notes[0]
    with pytest.raises(RecipeError, match="min_rank"):
        recipe_of().but("adapter.min_rank=2", "adapter=lora")


@pytest.mark.parametrize("name", PEER_NAMES)
def test_names_of_other_trainers_are_answered_with_ours(name):
    path, _, value = PEER_NAMES[name].partition("=")
    model = Recipe
    for part in path.split("."):
        assert part in model.model_fields, path
        model = next(settings_models(model.model_fields[part].annotation), model)
    if value:
        recipe_of().but(f"{path}={value}")
    if name not in Recipe.model_fields:
        with pytest.raises(RecipeError, match=f"Did you mean '{path}"):
            recipe_of().but(f"{name}=1")


def test_a_kind_may_be_a_bare_name_in_python():
    assert Base(model="a/b", quant="int8").quant == Int8()
    values = {"base": {"model": "a/b", "quant": "nf4"}, "adapter": "dora"}
    recipe = Recipe.model_validate(values | {"data": {"train": "x"}, "output": "o"})
    assert (recipe.base.quant, recipe.adapter.kind) == (NF4(), "dora")
    with pytest.raises(ValueError, match="nf5"):
        Base(model="a/b", quant="nf5")


def test_a_new_rank_is_noted_if_it_changes_the_scale():
    recipe = Recipe(
        base=Base(model="x"), adapter=LoRA(rank=32, alpha=64), data=Data(train="x"), output="x"
    )
    _, notes = vary(recipe, ["adapter.rank=4"])
    assert notes == ["adapter.alpha stays 64, so the scale is 16 instead of 2"]
    _, (kept, scale) = vary(recipe, ["adapter=dylora", "adapter.rank=8"])
    assert kept.startswith("adapter=dylora: kept alpha=64.0;")
    assert scale == "adapter.alpha stays 64, so the scale is 8 instead of 2"
    for assignments in (["adapter.rank=4", "adapter.alpha=8"], ["adapter.dropout=0.1"]):
        assert vary(recipe, assignments)[1] == []
