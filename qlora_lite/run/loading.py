"""A run, or any model directory, ready to use."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora_lite.adapters.attach import AttachedAdapter, attach, choose, match_modules
from qlora_lite.adapters.files import read_native
from qlora_lite.adapters.method import Method
from qlora_lite.adapters.split_state import SplitState, require_original
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.watch import Watcher
from qlora_lite.methods.catalogue import method_for
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.config import read_config
from qlora_lite.model.load import Base, LoadedBase, load_base, load_tokenizer
from qlora_lite.model.prequantised import own_quant
from qlora_lite.model.quant import BF16, FP32, Quant
from qlora_lite.model.shape import model_shape
from qlora_lite.model.targets import linear_specs, specs_of_shape
from qlora_lite.recipe import Recipe
from qlora_lite.recipe_files import load_recipe
from qlora_lite.run.folder import RunFolder


@dataclass
class LoadedModel:
    """A model that can speak and be scored."""

    base: LoadedBase
    tokenizer: PreTrainedTokenizerBase
    attached: AttachedAdapter | None
    """The adapter, for a run; None for a plain model."""
    recipe: Recipe | None

    @property
    def causal(self) -> CausalModel:
        return CausalModel(self.base.model)

    @property
    def model(self) -> torch.nn.Module:
        """The transformers module, ready for `generate`."""
        return self.base.model


def load_run(
    run: str | Path, device: str | None = None, watcher: Watcher | None = None
) -> LoadedModel:
    """A finished run: its base as it was in training, with the adapter attached.

    Raises:
        RunError: if there is no run, it has no adapter yet, or its base changed.
    """
    folder = RunFolder(Path(run))
    folder.read_record()
    folder.read_sidecar()
    recipe = load_recipe(folder.recipe)
    for note in folder.unfinished_extension():
        (watcher or Watcher()).note(note)
    folder.require_base(recipe.base)
    saved = read_native(folder.adapter)
    loaded = load_for_training(recipe, device, watcher, saved)
    assert loaded.attached is not None
    loaded.attached.load_state(saved)
    return loaded


def load_for_training(
    recipe: Recipe,
    device: str | None = None,
    watcher: Watcher | None = None,
    saved: Mapping[str, Tensor] | None = None,
) -> LoadedModel:
    """A recipe's base with its adapter at the start.

    Args:
        saved: the adapter's state that will be loaded into it: the base is made as it was then.
    """
    watcher = watcher or Watcher()
    rule = devices.choose(device or recipe.device, recipe.base.compute)
    method = method_for(recipe.adapter)
    starts = _starts(recipe, method, saved)
    tokenizer = load_tokenizer(recipe.base)
    base = load_base(recipe.base, rule, split=starts.split, progress=watcher.loading)
    attached = attach(
        base.model,
        method,
        linear_specs(base.model),
        recipe.seed,
        devices.DTYPES.get(recipe.adapter.dtype, rule.adapters),
        starts,
    )
    attached.train(False)
    return LoadedModel(base, tokenizer, attached, recipe)


def _starts(recipe: Recipe, method: Method, saved: Mapping[str, Tensor] | None) -> SplitState:
    """The layers that will be adapted, planned before the first weight is read."""
    base = recipe.base
    config = read_config(base.model, base.revision, base.trust_remote_code)
    require_original(method, is_packed=own_quant(config) is not None)
    shape = model_shape(config, base.trust_remote_code)
    modules = [parameter.module for parameter in shape.parameters]
    whole = match_modules(modules, recipe.adapter.train_modules)
    return SplitState(method, choose(specs_of_shape(shape), method, whole), recipe.seed, saved)


def load_model(
    model: str, quant: Quant | None = None, device: str = "auto", watcher: Watcher | None = None
) -> LoadedModel:
    """Any model directory or hub id, frozen; as it is stored unless `quant` is given.

    A checkpoint quantised by bitsandbytes stays so, one in fp32 is held in fp32, any other in bf16.
    """
    rule = devices.choose(device)
    base = Base(model=model, quant=quant or _own_precision(model))
    tokenizer = load_tokenizer(base)
    loaded = load_base(base, rule, progress=(watcher or Watcher()).loading)
    return LoadedModel(loaded, tokenizer, None, None)


def load(target: str | Path, device: str = "auto", watcher: Watcher | None = None) -> LoadedModel:
    """A run if it is one, any other model otherwise.

    Raises:
        BaseModelError: if it is neither.
    """
    path = Path(target)
    if (path / "recipe.json").is_file():
        return load_run(path, None if device == "auto" else device, watcher)
    if path.is_dir() and not (path / "config.json").is_file():
        raise BaseModelError(
            f"{path} is neither a run (it has no recipe.json) nor a model (no config.json). "
            "Give a run's folder, a model directory or a hub id"
        )
    return load_model(str(target), device=device, watcher=watcher)


def _own_precision(model: str) -> Quant:
    config = read_config(model)
    plain: Quant = FP32() if config.dtype == torch.float32 else BF16()
    return own_quant(config) or plain
