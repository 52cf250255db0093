"""Held-out loss of a trained adapter truncated to lower ranks."""

from pathlib import Path

from torch import Tensor

from method_study.contenders import RANK
from method_study.results import Values
from qlora_lite.adapters.attach import replace
from qlora_lite.adapters.layer import AdapterLayer
from qlora_lite.data.load import load_data
from qlora_lite.evaluation.perplexity import score
from qlora_lite.methods.lora import LoRALayer
from qlora_lite.run.job import held_out_batches
from qlora_lite.run.loading import load_run


def losses_by_rank(run: Path) -> Values:
    """Held-out loss of a run's adapter at every rank up to 8."""
    loaded = load_run(run)
    assert loaded.attached is not None
    assert loaded.recipe is not None
    data = load_data(loaded.recipe.data, loaded.tokenizer, loaded.recipe.seed)
    batches = list(held_out_batches(loaded.recipe, data.heldout, loaded.packs))
    losses = []
    for rank in range(1, RANK + 1):
        for path, layer in loaded.attached.layers.items():
            pair = truncated(layer, rank)
            replace(loaded.model, path, LoRALayer(layer.base, *pair, scale=1.0))
        losses.append(score(loaded.causal, batches).loss)
    return {"losses": losses}


def truncated(layer: AdapterLayer, rank: int) -> tuple[Tensor, Tensor]:
    """The pair at a lower rank: as exported by the method, else its first components.

    The DyLoRA paper calls the first b rows of A and columns of B, at the scale of training, a
    truncated LoRA.
    """
    pair = layer.factors(rank)
    if pair is not None:
        return pair.down, pair.up
    full = layer.factors()
    assert full is not None, f"{type(layer).__name__} has no pair to truncate"
    return full.down[:rank].clone(), full.up[:, :rank].clone()
