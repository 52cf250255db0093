"""Load a run, or any model directory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.configuration_utils import PretrainedConfig

from qlora_lite.adapters.attach import AttachedAdapter, attach
from qlora_lite.adapters.files import read_native
from qlora_lite.adapters.split_state import SplitState
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model.base_files import BaseFiles
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.facts import BaseFacts, read_facts
from qlora_lite.model.load import LoadedBase, load_base
from qlora_lite.model.prequantised import own_quant
from qlora_lite.model.probes import probe
from qlora_lite.model.quant import BF16, FP32, Quant
from qlora_lite.model.settings import Base
from qlora_lite.model.tokenizer import load_tokenizer
from qlora_lite.recipe import Recipe
from qlora_lite.run.computing import rule_of_run, slow_bf16, with_fast_products
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.setup import RunSetup, set_up
from qlora_lite.run.tokenizers import trained_tokenizer
from qlora_lite.shards.gguf.header import find_gguf


@dataclass
class LoadedModel:
    """A model with its tokenizer, ready to generate and to be scored."""

    base: LoadedBase
    tokenizer: PreTrainedTokenizerBase
    attached: AttachedAdapter | None
    """The adapter, for a run; None for a plain model."""
    recipe: Recipe | None
    packs: bool
    """Packed rows do not see each other (`model/probes.py`)."""

    @property
    def causal(self) -> CausalModel:
        return CausalModel(self.base.model)

    @property
    def model(self) -> torch.nn.Module:
        """The transformers module, ready for `generate`."""
        return self.base.model


def load_run(
    run: str | Path,
    device: str | None = None,
    watcher: Watcher | None = None,
    *,
    trust_remote_code: bool = False,
    facts: BaseFacts | None = None,
) -> LoadedModel:
    """Load a finished run: its base as it was in training, with the adapter attached.

    Args:
        facts: of its base; read here unless given.
        trust_remote_code: let the base run its own Python code.

    Raises:
        RunError: if there is no run, it has no adapter yet, or its base changed.
    """
    watcher = watcher or Watcher()
    folder = RunFolder(Path(run))
    recipe = folder.trained_recipe(trust_remote_code=trust_remote_code)
    for note in folder.unfinished_extension():
        watcher.note(note)
    files = folder.require_base(recipe.base)
    saved = read_native(folder.adapter)
    rule = rule_of_run(recipe, folder, device)
    for note in slow_bf16(rule):
        watcher.note(note)
    setup = set_up(recipe, rule, facts=facts)
    tokenizer = trained_tokenizer(recipe, folder)
    loaded = load_adapted(setup, tokenizer, watcher, saved, files)
    assert loaded.attached is not None
    loaded.attached.load_state(saved)
    return loaded


def load_adapted(
    setup: RunSetup,
    tokenizer: PreTrainedTokenizerBase,
    watcher: Watcher,
    saved: Mapping[str, Tensor] | None = None,
    files: BaseFiles | None = None,
    partition: Callable[[torch.nn.Module], None] | None = None,
) -> LoadedModel:
    """Load a recipe's base and attach its adapter, untrained.

    Args:
        saved: the adapter's state that the caller will load. The results of `Method.split` are
            taken from it, so that the base is quantised as it was in training.
        files: of the base; located here unless given.
        partition: divides the weights of a module among processes. The base cannot be probed then;
            `packs` is what is known of its architecture.
    """
    recipe = setup.recipe
    split_state = SplitState(setup.method, setup.adapter, recipe.seed, saved)
    base = load_base(
        recipe.base,
        setup.rule,
        facts=setup.facts,
        files=files,
        split=split_state.split,
        progress=watcher.loading,
        installed=partition,
    )
    packs = setup.facts.packs if partition else _packs(base, setup.facts, recipe.base.model)
    attached = attach(
        base.model, setup.method, setup.adapter, recipe.seed, setup.adapter_dtype, split_state
    )
    attached.train(False)
    return LoadedModel(base, tokenizer, attached, recipe, packs)


def load_model(
    model: str,
    quant: Quant | None = None,
    device: str = "auto",
    watcher: Watcher | None = None,
    *,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load any model directory, GGUF file or hub id, frozen.

    It keeps its own precision unless `quant` is given.

    A checkpoint quantised by bitsandbytes stays quantised, fp32 stays fp32, any other becomes bf16.
    On a CPU it computes in fp32, whatever the processor: there is no setting to choose it.
    """
    rule = with_fast_products(devices.choose(device))
    base = Base(model=model, trust_remote_code=trust_remote_code)
    facts = read_facts(base)
    base = base.model_copy(update={"quant": quant or _own_precision(facts.config)})
    tokenizer = load_tokenizer(base)
    loaded = load_base(base, rule, facts=facts, progress=(watcher or Watcher()).loading)
    return LoadedModel(loaded, tokenizer, None, None, _packs(loaded, facts, model))


def load(
    target: str | Path,
    device: str = "auto",
    watcher: Watcher | None = None,
    *,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a run's folder, a model directory, a GGUF file or a hub id.

    Args:
        trust_remote_code: let the base run its own Python code.

    Raises:
        BaseModelError: if it is a directory, but neither a run nor a model.
    """
    path = Path(target)
    if (path / "recipe.json").is_file():
        own_device = None if device == "auto" else device
        return load_run(path, own_device, watcher, trust_remote_code=trust_remote_code)
    is_model = (path / "config.json").is_file() or find_gguf(path) is not None
    if path.is_dir() and not is_model:
        raise BaseModelError(
            f"{path} is neither a run (no recipe.json) nor a model (no config.json, no GGUF "
            "file). Give a run's folder, a model directory, a GGUF file or a hub id"
        )
    return load_model(
        str(target), device=device, watcher=watcher, trust_remote_code=trust_remote_code
    )


def _packs(base: LoadedBase, facts: BaseFacts, name: str) -> bool:
    """Probe a loaded base.

    Raises:
        BaseModelError: if it does not behave like a causal language model.
    """
    model = CausalModel(base.model)
    return probe(model, facts.vocabulary, name, base.rule.compute).packs


def _own_precision(config: PretrainedConfig) -> Quant:
    plain: Quant = FP32() if config.dtype == torch.float32 else BF16()
    return own_quant(config) or plain
