"""Compare the logits of the merged model with those of the trained one (adapter on base).

    reference = sample_logits(trained, batches)
    agreement = compare(reference, sample_logits(read_back(directory, rule), batches), targets)

In exact arithmetic they would be equal. In practice fp32 sums differ in their last digits, and
16-bit files by the rounding of every weight, for which `rounding_bounds` gives bounds.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from qlora_lite.data.collate import Batch
from qlora_lite.export.merge import MergedWeights
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.kernels.cross_entropy import IGNORE_INDEX
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.load import allocated, build_empty
from qlora_lite.model.settings import Base

SAMPLED_TOKENS = 256
"""Tokens whose logits are compared: 128 MB for a vocabulary of 128k."""

EXACT = 1e-4
"""Largest difference relative to the largest logit when everything is in fp32."""

SAFETY = 4
"""Bounds on logits are this many times the error that rounding causes on average. Measured in bf16
and fp16, the error is 0.9 to 1.1 times that average for SmolLM2-135M, and 1.1 to 1.6 times for a
Llama and a GPT-2 of two layers with random weights."""

MAX_LOSS_INCREASE = 0.5
"""In nats: what the merge on the original base may at most score worse than the trained model."""


@dataclass(frozen=True)
class Agreement:
    """How close the logits of two models are."""

    relative_error: float
    """Largest absolute difference over the largest absolute logit."""
    top1: float
    """Share of tokens at which both models predict the same token."""
    num_tokens: int
    rms_error: float = 0.0
    """RMS difference over RMS logit, after subtracting the mean of each token."""
    loss_change: float = 0.0
    """How much larger the mean loss on these tokens is, in nats."""

    @property
    def is_exact(self) -> bool:
        """Whether the logits are equal up to the order of fp32 sums."""
        return self.relative_error <= EXACT


@dataclass(frozen=True)
class Bounds:
    """How far a merged model may be from the trained one."""

    rms_error: float
    top1: float
    loss_change: float

    def problem(self, found: Agreement) -> str | None:
        """What is out of bounds; None if nothing is. NaN is out of bounds."""
        if not found.rms_error <= self.rms_error:
            return f"logits differ by {found.rms_error:.1%}, at most {self.rms_error:.1%} may be"
        if not found.top1 >= self.top1:
            return f"{found.top1:.1%} of top-1 predictions agree, at least {self.top1:.1%} must"
        if not found.loss_change <= self.loss_change:
            return (
                f"the loss is {found.loss_change:.3f} nats higher, at most {self.loss_change:.3f} "
                "may be"
            )
        return None


def rounding_bounds(
    reference: Tensor, files: torch.dtype, compute: torch.dtype, num_products: int
) -> Bounds:
    """Bounds for what rounding the weights to `files` does to logits, loss and predictions.

    Rounding a number changes it by eps / 5 on average (RMS, relative). One matrix product has
    that relative error, K products one after the other sqrt(K) times as much; computing in 16 bit
    rounds about four more numbers per product. `SAFETY` times that is the bound on the logits.
    An average change d of the logits changes the mean loss by less than 2 d, and a prediction only
    where the reference's best two logits are closer than 2 `SAFETY` d.

    Args:
        reference: logits of the trained model, (tokens, vocabulary).
        files: dtype of the written weights.
        compute: dtype in which both models ran.
        num_products: K, the weight matrices of the model.
    """
    variance = (torch.finfo(files).eps / 5) ** 2 + 4 * (torch.finfo(compute).eps / 5) ** 2
    error = max(math.sqrt(num_products * variance), EXACT / SAFETY)
    return _allowing(reference, error, max(2 * error * _size(reference), EXACT))


def original_bounds(
    reference: Tensor, bare_trained: Tensor, bare_original: Tensor, rounding: Bounds
) -> Bounds:
    """Bounds for the merge on the original base, which differs by the error of quantisation.

    The adapter is the same on both bases, so their merges differ about as much as the bases
    without it, plus rounding.

    Args:
        reference: logits of the trained model, (tokens, vocabulary).
        bare_trained: those of the quantised base without the adapter.
        bare_original: those of the original base.
        rounding: from `rounding_bounds`.
    """
    quantisation = _size(bare_original - bare_trained) / _size(reference)
    error = math.hypot(quantisation, rounding.rms_error / SAFETY)
    change = error * _size(reference)
    return _allowing(reference, error, min(max(2 * SAFETY * change, EXACT), MAX_LOSS_INCREASE))


def _allowing(reference: Tensor, error: float, loss_change: float) -> Bounds:
    """Bounds for logits that differ by `error` on average (RMS, relative)."""
    best, second = reference.topk(2).values.unbind(-1)
    is_certain = best - second > 2 * SAFETY * error * _size(reference)
    return Bounds(SAFETY * error, is_certain.float().mean().item(), loss_change)


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


def sample_targets(batches: Iterable[Batch]) -> Tensor:
    """The targets of the tokens of `sample_logits`, (tokens,)."""
    found = [batch.targets[batch.targets != IGNORE_INDEX] for batch in batches]
    return torch.cat(found)[:SAMPLED_TOKENS].cpu()


def compare(reference: Tensor, other: Tensor, targets: Tensor | None = None) -> Agreement:
    """Compare logits of two models at the same tokens, (tokens, vocabulary).

    Args:
        targets: the tokens to predict; without them the losses are not compared.
    """
    difference = other - reference
    error = difference.abs().max() / reference.abs().max()
    top1 = (other.argmax(-1) == reference.argmax(-1)).float().mean()
    rms = _size(difference) / _size(reference)
    change = 0.0
    if targets is not None:
        losses = [F.cross_entropy(logits, targets).item() for logits in (reference, other)]
        change = losses[1] - losses[0]
    return Agreement(error.item(), top1.item(), len(reference), rms, change)


def _size(logits: Tensor) -> float:
    """RMS of logits. Adding the same number to all logits of a token changes nothing."""
    return (logits - logits.mean(-1, keepdim=True)).square().mean().sqrt().item()


def candidate(weights: MergedWeights, base: Base, rule: DeviceRule) -> CausalModel:
    """The merged model in memory, before it is written; it computes in the dtype of training."""
    config = copy.deepcopy(weights.layers.source.facts.config)
    if weights.untied:
        config.tie_word_embeddings = False
    model = build_empty(config, base)
    for spec in weights.specs:
        if (place := weights.place(spec.name)) is None:
            continue
        path, _, leaf = place.name.rpartition(".")
        module = model.get_submodule(path)
        tensor = weights.tensor(spec.name).to(rule.device)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        elif place.part is None:
            module._parameters[leaf] = nn.Parameter(tensor.to(rule.compute), requires_grad=False)
        else:
            parameter = allocated(module, leaf, rule)
            place.part.of(parameter.data).copy_(tensor)
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
