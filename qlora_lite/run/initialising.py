"""Write a recipe file for any model: settings chosen by its size, and its memory plan."""

import json
import os
import re
from pathlib import Path

from qlora_lite.data.settings import Data
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.errors import RecipeError
from qlora_lite.foundation.files import make_folder, write_text
from qlora_lite.foundation.units import format_bytes, format_count
from qlora_lite.memory.known import known_config
from qlora_lite.memory.measure import available_bytes
from qlora_lite.memory.plan import Plan
from qlora_lite.model.config import read_config
from qlora_lite.model.settings import Base
from qlora_lite.model.shape import model_shape
from qlora_lite.recipe import Recipe
from qlora_lite.run.computing import new_rule
from qlora_lite.run.planning import check_files, plan_memory
from qlora_lite.run.setup import set_up

PLACEHOLDER = "YOUR_DATA.jsonl"
_UNFILLED = PLACEHOLDER.encode()
MAX_ROW_TOKENS = 2048
BUDGET_SHARE = 0.9
"""Share of the memory that is free now; the rest is for other programs."""

_TEMPLATE = '''\
"""{name}: {size} parameters in NF4, a LoRA of rank {rank} on every linear layer.

Planned on this machine: {needs} (an estimate by formula; `qlora-lite plan {file}`).
See what is trained with `qlora-lite preview {file}`, then run `qlora-lite train {file}`.
"""

from qlora_lite import NF4, Base, Data, LoRA, Optim, Recipe, main

recipe = Recipe(
    base=Base(
        model={model},
        quant=NF4(),{trust}
    ),
    adapter=LoRA(
        rank={rank},
        alpha={alpha},
        targets="all-linear",
    ),
    data=Data(
        train={placeholder},  # <- your file (.jsonl, .csv, .parquet, .txt) or a hub id
        max_tokens={max_tokens},
    ),
    optim=Optim(
        lr={lr},
        tokens_per_step=16_384,
        epochs=1,
    ),
    budget="{budget}",
    output={output},
)

if __name__ == "__main__":
    main(recipe)
'''


def write_recipe(
    model: str, output: Path | None = None, *, trust_remote_code: bool = False
) -> tuple[Path, Plan]:
    """Write a recipe for a model directory, a GGUF file or a hub id; reads no weights.

    Args:
        output: the file; `name_of_the_model.py` in this folder unless given.
        trust_remote_code: let the model run its own Python code, now and in the recipe.

    Raises:
        RecipeError: if the file exists and is not what this writes, or cannot be a recipe.
        BaseModelError: if there is no such model, or its files would not be loaded.
    """
    file = output or Path(f"{_slug(model)}.py")
    if file.suffix != ".py":
        raise RecipeError(
            f"got {file}, and a recipe is a Python file. Give a name that ends in .py"
        )
    exists = file.exists()
    if os.path.lexists(file) and not _is_ours(file):
        raise _exists(file)
    text, plan = recipe_text(model, file, trust_remote_code)
    if exists:
        if _settings_in(file.read_text(encoding="utf-8")) != _settings_in(text):
            raise _exists(file)
        return file, plan
    make_folder(file.parent)
    write_text(file, text)
    return file, plan


def _exists(file: Path) -> RecipeError:
    return RecipeError(
        f"{file} exists already, and nothing is overwritten. Give another name: --output FILE"
    )


def _is_ours(file: Path) -> bool:
    """Whether this may be the unchanged result of an earlier call."""
    return file.is_file() and _UNFILLED in file.read_bytes()


def _settings_in(text: str) -> list[str]:
    """The lines that do not depend on how much memory is free now."""
    return [line for line in text.splitlines() if not line.startswith(("Planned", "    budget="))]


def recipe_text(model: str, file: Path, trust_remote_code: bool = False) -> tuple[str, Plan]:
    """The text of a recipe for `model` that will be written to `file`, and its plan.

    Raises:
        BaseModelError: if there is no such model, or its files would not be loaded.
    """
    if Path(model).exists():
        model = str(Path(model).resolve())
    config = read_config(model, trust_remote_code=trust_remote_code, known=known_config(model))
    num_parameters = model_shape(config, trust_remote_code).num_parameters
    rank, lr = settings_for(num_parameters)
    context = getattr(config.get_text_config(), "max_position_embeddings", MAX_ROW_TOKENS)
    max_tokens = min(context, MAX_ROW_TOKENS)
    budget = _budget()
    name = _slug(model)
    recipe = Recipe.model_validate(
        {
            "base": Base(model=model, trust_remote_code=trust_remote_code),
            "adapter": {"kind": "lora", "rank": rank, "alpha": 2 * rank},
            "data": Data(train=PLACEHOLDER, max_tokens=max_tokens),
            "optim": {"lr": lr},
            "budget": budget,
            "output": f"runs/{name}",
        }
    )
    setup = set_up(recipe, new_rule(recipe, allow_absent=True), needs_config=False)
    check_files(setup)
    plan = plan_memory(setup)
    text = _TEMPLATE.format(
        name=re.sub(r'["\\\\]', "", Path(model).name),
        size=format_count(num_parameters),
        needs=f"{format_bytes(plan.peak_bytes)} of {format_bytes(plan.budget_bytes)}",
        file=file.name,
        model=_quoted(model),
        trust="\n        trust_remote_code=True," if trust_remote_code else "",
        placeholder=_quoted(PLACEHOLDER),
        rank=rank,
        alpha=2 * rank,
        max_tokens=max_tokens,
        lr=_exponent(lr),
        budget=budget,
        output=_quoted(recipe.output),
    )
    return text, plan


def settings_for(num_parameters: int) -> tuple[int, float]:
    """Rank and learning rate by size.

    1e-4 above 20 G and 2e-4 below are those of Dettmers et al. 2023 (arXiv:2305.14314, table 9).
    Small models need a higher rank to learn enough, and train well with a higher rate.
    """
    if num_parameters > 20e9:
        return 16, 1e-4
    if num_parameters > 1e9:
        return 16, 2e-4
    return 32, 5e-4


def _budget() -> str:
    """`BUDGET_SHARE` of the memory that is free now, rounded to tenths of a GiB."""
    free = available_bytes(devices.choose().device) * BUDGET_SHARE
    return f"{free / 2**30:.1f}GiB"


def _slug(model: str) -> str:
    """A model's name as a file name: `Qwen/Qwen3-0.6B` -> `qwen3_0_6b`."""
    return (
        re.sub(r"[^a-z0-9]+", "_", Path(model).resolve().name.lower().removesuffix(".gguf")).strip(
            "_"
        )
        or "model"
    )


def _quoted(text: str) -> str:
    """A Python string in the quotes that the formatter prefers."""
    return repr(text) if text.count('"') > text.count("'") else json.dumps(text, ensure_ascii=False)


def _exponent(lr: float) -> str:
    """`0.0002` as `2e-4`."""
    return f"{lr:.0e}".replace("e-0", "e-")
