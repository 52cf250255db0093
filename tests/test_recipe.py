"""Recipes: from Python and JSON, varied, and what is said about mistakes."""

import json

import pytest

from qlora_lite.adapters.lora import LoRA
from qlora_lite.adapters.rslora import RsLoRA
from qlora_lite.data.settings import Data
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.model.load import Base
from qlora_lite.model.quant import NF4, Int8
from qlora_lite.recipe import Recipe, differences, load_recipe, vary

RECIPE = Recipe(
    base=Base(model="some/model", quant=NF4(block_size=128)),
    adapter=LoRA(rank=8, targets="mlp"),
    data=Data(train="rows.jsonl"),
    output="runs/x",
)


def test_a_variant_is_an_overlay_with_the_same_checks():
    other = RECIPE.but("optim.lr=1e-4", "adapter.rank=32", "budget=22GiB")
    assert other.optim.lr == 1e-4
    assert other.adapter == LoRA(rank=32, targets="mlp")
    assert other.base == RECIPE.base
    assert RECIPE.adapter.rank == 8


def test_another_kind_keeps_what_it_shares_and_says_so():
    other, notes = vary(RECIPE, ["adapter=rslora", "base.quant=int8"])
    assert other.adapter == RsLoRA(rank=8, targets="mlp")
    assert other.base.quant == Int8()
    assert notes == [
        "adapter=rslora: kept rank=8, targets=mlp; the rest takes the defaults of rslora"
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
        ("base=gpt2", r"base: got 'gpt2': it has settings of its own: base\.model, base\."),
        ("adapter=3", r"adapter: got 3: a kind is needed, adapter=NAME with one of lora, "),
        ('adapter={"rank": 4}', r"a kind is needed, adapter=NAME with one of lora, "),
        ("base.quant=4", r"base\.quant=NAME with one of nf4, fp4"),
        ("tracking=wandbb", r"tracking.*Did you mean 'wandb'"),
        ("optim.betas=0.9", r"optim\.betas: got 0\.9: a list is needed"),
        ("output=1", r"""text is needed. For a shell: output='"1"'$"""),
        ("data.train=null", r"data\.train: got None: text is needed$"),
        (
            "adapter.targets=3",
            r"^adapter\.targets: got 3: text is needed.*, or a list is needed[^\n]*$",
        ),
        ("data.prompt=[INST] {", r"^data\.prompt: got '\[INST\] \{': (?!.*JSON)"),
        ("data.fields={prompt:question}", r"JSON is needed(?!.*begins as JSON)"),
        ('adapter.ranks={"0": "many"}', r"^adapter\.ranks\.0: got 'many'"),
        ("data.columns=text", r'a list is needed, such as \["a", "b"\]'),
        ("data.fields=question", r"data\.fields: .*JSON is needed"),
        ("adapter.ranks=4", r"an object is needed"),
        ('adapter={"rank": 4', r"begins as JSON and is none: Expecting ',' delimiter"),
        ("optim.betas=[0.9", r"begins as JSON and is none"),
    ],
)
def test_a_mistake_is_told_with_its_path_and_a_near_match(change, words):
    with pytest.raises(RecipeError, match=words):
        RECIPE.but(change)


def test_every_mistake_has_a_line_of_its_own():
    with pytest.raises(RecipeError) as caught:
        RECIPE.but('optim={"lr": -1, "rate": 2, "schedule": "cosin"}', "data.columns=3")
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "data.columns",
        "optim.lr",
        "optim.schedule",
        "optim.rate",
    ]


def test_a_run_record_is_a_recipe(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": RECIPE.as_values(), "threads": 2}))
    assert load_recipe(tmp_path) == RECIPE.but(f"output={tmp_path}")
    assert load_recipe(tmp_path / "recipe.json") == RECIPE


def test_a_python_recipe_may_build_on_its_neighbour(tmp_path):
    (tmp_path / "small_one.py").write_text(
        "from qlora_lite import Base, Data, Recipe\n"
        "recipe = Recipe(base=Base(model='a/b'), data=Data(train='t.jsonl'), output='o')\n"
    )
    (tmp_path / "large_one.py").write_text(
        "from small_one import recipe as small\nrecipe = small.but('base.model=c/d')\n"
    )
    assert load_recipe(tmp_path / "large_one.py").base.model == "c/d"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe = 3\n", r"defines no `recipe = Recipe"),
        ("import nowhere_to_be_found\n", r"line 1: ModuleNotFoundError"),
        ("x = 1\ny = 1 / 0\n", r"line 2: ZeroDivisionError"),
        ("recipe = Recipe(\n", r"line 1: SyntaxError"),
        (
            "from qlora_lite import LoRA\nrecipe = LoRA(rnk=3)\n",
            r"LoRA\(\.\.\.\): rnk: .*Did you mean 'rank'",
        ),
        ("import sys\nsys.exit(0)\n", r"line 2 ends the program while it is read"),
    ],
)
def test_a_recipe_that_does_not_load_says_where(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.py", None, "is not a file"),
        ("recipe.yaml", "a: 1", "a .py file or"),
        ("recipe.json", "{", "not readable JSON"),
        ("recipe.json", "[]", "a recipe is an object"),
        ("recipe.json", '{"base": {}}', "needed, and nothing was given"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / name)


def test_the_line_is_told_for_a_relative_path_too(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("x = 1\ny = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"mine\.py, line 2: ZeroDivisionError"):
        load_recipe("mine.py")


def test_a_model_is_no_recipe(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=f"{tmp_path} is a model.*init {tmp_path}"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"describes a model"):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        load_recipe(tmp_path / "config.json")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"is an adapter.*adapter\.start=.*adapter begins"):
        load_recipe(tmp_path / "adapter")
    with pytest.raises(RecipeError, match=r"gone\.py is not a file"):
        load_recipe(tmp_path / "gone.py")


def test_a_tracker_may_be_named_alone():
    assert RECIPE.but("tracking=wandb").tracking == ["wandb"]
    assert RECIPE.but('tracking=["wandb"]').tracking == ["wandb"]


def test_differences_name_the_path_and_both_values():
    other = RECIPE.but("optim.lr=1e-4", "adapter=rslora")
    found = differences(RECIPE.as_values(), other.as_values())
    assert "optim.lr: 0.0002 -> 0.0001" in found
    assert "adapter.kind: 'lora' -> 'rslora'" in found


@pytest.mark.parametrize("value", ["Infinity", "NaN", "-Infinity"])
def test_numbers_are_finite(value):
    with pytest.raises(RecipeError, match=r"optim\.lr: .*finite number"):
        RECIPE.but(f"optim.lr={value}")


def test_a_key_of_data_fields_is_a_field_of_a_format():
    with pytest.raises(RecipeError, match=r"'inptu' is no field of a format. Did you mean 'input'"):
        RECIPE.but('data.fields={"inptu": "context"}')


def test_a_budget_may_be_plain_bytes():
    assert RECIPE.but("budget=800000000").budget == "800000000"
