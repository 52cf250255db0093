"""A tiny base with an adapter as if trained: noise in every trained tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_lite.adapters.attach import AttachedAdapter, attach
from qlora_lite.adapters.method import AdapterSettings
from qlora_lite.adapters.plan import plan_adapter
from qlora_lite.data.collate import Batch, make_batch, make_bin
from qlora_lite.data.examples import Example
from qlora_lite.export.trained_layers import MergeSource
from qlora_lite.foundation.device import choose
from qlora_lite.methods.catalogue import method_for
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.base_files import BaseFiles
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.facts import read_facts
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import NF4, Quant
from qlora_lite.model.settings import Base
from tests.tiny import VOCABULARY, save_tiny

SEED = 3


@dataclass
class Trained:
    """A trained model in memory, and the source for merging it."""

    causal: CausalModel
    attached: AttachedAdapter
    source: MergeSource


def train_a_little(
    directory: Path,
    quant: Quant | None = None,
    adapter: AdapterSettings | None = None,
    *,
    family: str = "llama",
    noise: float = 0.05,
    head: str = "16bit",
    **tiny: Any,
) -> Trained:
    """`noise` 0 leaves the adapter at its start, where B is zero."""
    if not directory.exists():
        save_tiny(directory, family, **tiny)
    base = Base(model=str(directory), quant=quant or NF4(), head=head)
    adapter = adapter or LoRA(rank=4, alpha=8)
    rule = choose("cpu")
    facts, method = read_facts(base), method_for(adapter)
    loaded = load_base(base, rule, facts=facts)
    attached = attach(loaded.model, method, plan_adapter(method, facts), SEED, rule.adapters)
    generator = torch.Generator().manual_seed(SEED)
    for parameter in attached.parameters().values():
        draws = torch.randn(parameter.shape, generator=generator)
        parameter.data += (noise * draws).to(parameter.dtype)
    state = {name: p.detach().clone() for name, p in attached.parameters().items()}
    loaded.model.eval()
    source = MergeSource(base, facts, BaseFiles.of(directory), rule, adapter, state, SEED)
    return Trained(CausalModel(loaded.model), attached, source)


def batches() -> list[Batch]:
    """Two rows in one bin, and one in another."""
    generator = torch.Generator().manual_seed(11)
    rows = [_row(length, generator) for length in (17, 9, 21)]
    return [make_batch([make_bin(rows[:2]), make_bin(rows[2:])])]


def _row(length: int, generator: torch.Generator) -> Example:
    ids = torch.randint(4, VOCABULARY, (length,), generator=generator, dtype=torch.int32)
    return Example(ids, torch.arange(length) > 2, row=0)


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory, read by safetensors' own loader."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found
