"""Compare the logits of the merged model with those of the trained one (adapter on base).

    reference = sample_logits(trained, batches)
    agreement = compare(reference, sample_logits(read_back(directory, rule), batches))

In exact arithmetic they would be equal. In practice fp32 sums differ in their last digits, and
16-bit files by the rounding of every weight.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from qlora_lite.data.collate import Batch
from qlora_lite.export.merge import MergedWeights
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.kernels.cross_entropy import IGNORE_INDEX
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.load import build_empty
from qlora_lite.model.settings import Base

SAMPLED_TOKENS = 256
"""Tokens whose logits are compared: 128 MB for a vocabulary of 128k."""

EXACT = 1e-4
"""Largest difference relative to the largest logit when everything is in fp32."""


@dataclass(frozen=True)
class Agreement:
    """How close the logits of two models are."""

    relative_error: float
    """Largest absolute difference over the largest absolute logit."""
    top1: float
    """Share of tokens at which both models predict the same token."""
    num_tokens: int

    @property
    def is_exact(self) -> bool:
        """Whether the logits are equal up to the order of fp32 sums."""
        return self.relative_error <= EXACT


@torch.no_grad()
def sample_logits(model: CausalModel, batches: Iterable[Batch]) -> Tensor:
    """Logits at the first trained tokens, (tokens, vocabulary) in fp32 on the CPU."""
    model.module.eval()
    sampled: list[Tensor] = []
    missing = SAMPLED_TOKENS
    for batch in (batch.to(model.device) for batch in batches):
        hidden = model.hidden(batch.input_ids, batch.position_ids)
        at_targets = hidden[batch.targets != IGNORE_INDEX][:missing]
        sampled.append(model.logits(at_targets).float().cpu())
        missing -= len(at_targets)
        if not missing:
            break
    return torch.cat(sampled)


def compare(reference: Tensor, other: Tensor) -> Agreement:
    """Compare logits of two models at the same tokens, (tokens, vocabulary)."""
    error = (other - reference).abs().max() / reference.abs().max()
    top1 = (other.argmax(-1) == reference.argmax(-1)).float().mean()
    return Agreement(error.item(), top1.item(), len(reference))


def candidate(weights: MergedWeights, base: Base, rule: DeviceRule) -> CausalModel:
    """The merged model in memory, before it is written; it computes in the dtype of training."""
    config = copy.deepcopy(weights.layers.source.facts.config)
    if weights.untied:
        config.tie_word_embeddings = False
    model = build_empty(config, base)
    for spec in weights.specs:
        path, _, leaf = weights.parameter_name(spec.name).rpartition(".")
        module = model.get_submodule(path)
        tensor = weights.tensor(spec.name).to(rule.device)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor.to(rule.compute), requires_grad=False)
    for tied, origin in model.all_tied_weights_keys.items():
        path, _, leaf = tied.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter(origin))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(rule.device)
    return CausalModel(model)


def read_back(directory: Path, base: Base, rule: DeviceRule) -> CausalModel:
    """Load a written directory with plain transformers, in the compute dtype."""
    attention = {} if base.attention == "auto" else {"attn_implementation": base.attention}
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=rule.compute, trust_remote_code=base.trust_remote_code, **attention
        )
    return CausalModel(model.to(rule.device).eval())


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bar of transformers."""
    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bar:
            logging.enable_progress_bar()
