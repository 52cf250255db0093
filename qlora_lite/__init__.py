"""Fine-tune the largest causal language model that your memory allows.

    from qlora_lite import NF4, Base, Data, LoRA, Recipe, merge, train

    recipe = Recipe(
        base=Base(model="Qwen/Qwen3-8B", quant=NF4()),
        adapter=LoRA(rank=16),
        data=Data(train="train.jsonl"),
        output="runs/mine",
    )
    train(recipe)
    merge(recipe.output, "merged")

The functions take and return plain values, raise the errors of `qlora_lite.foundation.errors` and
print nothing. Names are imported lazily, so `import qlora_lite` is fast. The settings of every
adapter method can be imported from here too: `from qlora_lite import DoRA`.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Waiting threads sleep instead of spinning. Small products on 2 cores, 3 pairs of runs: 0.86 times
# as fast on an idle machine, 1.6 times (0.8 to 5.6) next to two busy processes. OpenMP reads this
# once, when torch is first imported. On an idle machine, OMP_WAIT_POLICY=ACTIVE is faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# oneDNN and torch keep the compiled code of the last 1,024 shapes each: 270 MiB after 500 rows of
# other lengths with the demo's base, and no faster than with a few shapes.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
os.environ.setdefault("LRU_CACHE_CAPACITY", "8")

if TYPE_CHECKING:
    from qlora_lite.cli.script import main
    from qlora_lite.data.settings import Data
    from qlora_lite.methods.lora import LoRA
    from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8
    from qlora_lite.model.settings import Base
    from qlora_lite.recipe import Recipe
    from qlora_lite.recipe_files import load_recipe
    from qlora_lite.run.chat import load
    from qlora_lite.run.extracting import extract
    from qlora_lite.run.merging import merge
    from qlora_lite.run.planning import plan_recipe as plan
    from qlora_lite.run.training import run_recipe as train
    from qlora_lite.training.settings import Checkpoints, Evaluation, Optim

    __version__: str

_MODULES = {
    "NF4": "qlora_lite.model.quant:NF4",
    "FP4": "qlora_lite.model.quant:FP4",
    "Int8": "qlora_lite.model.quant:Int8",
    "BF16": "qlora_lite.model.quant:BF16",
    "FP32": "qlora_lite.model.quant:FP32",
    "Base": "qlora_lite.model.settings:Base",
    "Data": "qlora_lite.data.settings:Data",
    "LoRA": "qlora_lite.methods.lora:LoRA",
    "Optim": "qlora_lite.training.settings:Optim",
    "Evaluation": "qlora_lite.training.settings:Evaluation",
    "Checkpoints": "qlora_lite.training.settings:Checkpoints",
    "Recipe": "qlora_lite.recipe:Recipe",
    "load_recipe": "qlora_lite.recipe_files:load_recipe",
    "main": "qlora_lite.cli.script:main",
    "plan": "qlora_lite.run.planning:plan_recipe",
    "train": "qlora_lite.run.training:run_recipe",
    "load": "qlora_lite.run.chat:load",
    "merge": "qlora_lite.run.merging:merge",
    "extract": "qlora_lite.run.extracting:extract",
}

__all__ = [
    "BF16",
    "FP4",
    "FP32",
    "NF4",
    "Base",
    "Checkpoints",
    "Data",
    "Evaluation",
    "Int8",
    "LoRA",
    "Optim",
    "Recipe",
    "__version__",
    "extract",
    "load",
    "load_recipe",
    "main",
    "merge",
    "plan",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("qlora-lite")
    if name in _MODULES:
        module, _, attribute = _MODULES[name].partition(":")
        value = getattr(importlib.import_module(module), attribute)
    else:
        value = _adapter(name)
    globals()[name] = value
    return value


def _adapter(name: str) -> Any:
    """The settings class of a method, by its name."""
    if name[0].isupper():
        from qlora_lite.methods.catalogue import METHODS

        for settings in METHODS:
            if settings.__name__ == name:
                return settings
    raise AttributeError(f"module 'qlora_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
