"""BA-LoRA: PiSSA with three regularisers on the outputs.

    L = L_task + l1 consistency + l2 diversity + l3 singular values

They keep the outputs close to those of the pre-trained model, diverse, and dominated by few
directions. Chang et al. 2024, arXiv:2408.04556. Z are the logits, p_T = softmax(Z / T), and q_T is
the same of the frozen base:

    language modelling, over the n trained tokens of a chunk
        consistency   T^2 mean KL(q_T || p_T)
        diversity     - mean entropy of p_1 among its `top_k` tokens
        singular      - (s_1 + ... + s_k) / ||Z||_F     of the logits (n, vocabulary)
    classification (`classes` are given), Z (n, classes) at the tokens whose target is a class
        consistency   mean squared difference of the rows of Z, each normalised to length 1
        diversity     (1 / classes) sum of squared off-diagonal covariances
        singular      - (s_1 + ... + s_k) / (sum of all s)

The weights change during the run, t = step / steps:

    l1 = consistency (0.1 + 0.9 (1 + cos(pi t)) / 2)
    l2, l3 = diversity, singular times f,   f = 0 until t = 0.2, linear to 1 at t = 0.25, then 1

The teacher is the same model with the adapter disabled, so the base must be unchanged: `mode` can
only be `offset`. The teacher costs a second forward. Diversity and singular values are computed per
chunk of at most 256 trained tokens, so they depend slightly on how a step is cut into
micro-batches.

Where the constants are from. The authors' release (llm172/BA-LoRA, train.py and
scripts/ba-lora.sh; by its README the paper's setting for generation with Llama 2 7B) has our
defaults: weights 0.025, 0.005 and 0.005, both schedules, k 10, top_k 20, T 2, the Frobenius norm,
no centring. The first versions of the paper have weights of 1e-4, 3e-4 and 1e-4 (for classification
1e-4, 4e-4 and 1e-4), without schedules; their code (cyp-jlu-ai/BA-LoRA) has k 3, T 1 and the whole
vocabulary. The terms for classification are those of this first code; the release has none, so
their default weights and schedules are our choice.

Where we deviate: the release leaves its masks unshifted against the labels; we take the logits that
predict the trained tokens. Its singular values are estimated with random probes if the vocabulary
is above 4,096; ours are exact, from the Gram matrix of a chunk. It skips the singular term of a
single token; ours is then the constant -1, with a gradient of zero. It computes the terms in the
model's dtype, we in fp32. Its optional adaptive weight (off in its script) is left out. The first
code reads `size(1)` of a vector and cannot run as released. With one class (a regression) the
diversity is zero and the consistency compares the plain values.
"""

import math
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from qlora_lite.adapters.method import OutputChunk, Requirement, StepInfo
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.pissa import PiSSA, PiSSAMethod

TINY = 1e-12
"""Added under roots and norms so that the gradient at zero is finite."""


class BALoRA(PiSSA):
    """Bias-alleviating adaptation: PiSSA with outputs close to the base, diverse and low-rank."""

    kind: Literal["ba_lora"] = "ba_lora"  # type: ignore[assignment]

    mode: Literal["offset"] = "offset"
    """Train increments and leave the base unchanged, because it is the teacher."""

    consistency: float = Field(default=0.025, ge=0)
    """Weight of staying close to the outputs of the frozen base (lambda 1)."""

    diversity: float = Field(default=0.005, ge=0)
    """Weight of keeping the outputs diverse (lambda 2)."""

    singular: float = Field(default=0.005, ge=0)
    """Weight of concentrating the outputs in few singular directions (lambda 3)."""

    schedule: Literal["release", "constant"] = "release"
    """`release`: consistency falls to 10 % by a cosine; diversity and singular are off for the
    first 20 % of the run and reach their weights at 25 %. `constant`: as in the first code."""

    temperature: float = Field(default=2.0, gt=0)
    """Temperature of the consistency term, for language modelling."""

    num_singular: int = Field(default=10, ge=1)
    """Number of dominant singular values (k)."""

    centred: bool = False
    """Subtract the mean of the logits over the tokens before the singular values."""

    top_k: int = Field(default=20, ge=2)
    """The entropy is that of the `top_k` most likely tokens."""

    classes: list[int] = Field(default_factory=list)
    """Token ids of the class labels, for classification; empty for language modelling. The terms
    then use only tokens whose target is a label, and are weighted by their share of all trained
    tokens."""


class Weights(NamedTuple):
    """The weights of the three terms in one step."""

    consistency: float
    diversity: float
    singular: float


def weights_at(settings: BALoRA, step: int, total: int) -> Weights:
    """The weights in optimizer step `step` of `total`, from 0."""
    s = settings
    if s.schedule == "constant":
        return Weights(s.consistency, s.diversity, s.singular)
    fall, rise = cosine_fall(step, total), delayed_rise(step, total)
    return Weights(s.consistency * fall, s.diversity * rise, s.singular * rise)


def cosine_fall(step: int, total: int) -> float:
    """From 1 at the first step to 0.1 at the end."""
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / total))


def delayed_rise(step: int, total: int) -> float:
    """0 for the first 20 % of the run, then linear to 1 over 5 %, in whole steps as released."""
    delay, ramp = int(0.2 * total), max(int(0.05 * total), 1)
    return min(max((step - delay) / ramp, 0.0), 1.0)


class BALoRAMethod(PiSSAMethod):
    """Adds the regularisers to the loss of every chunk."""

    settings: BALoRA
    logit_copies = 8

    def __init__(self, settings: BALoRA) -> None:
        super().__init__(settings)
        # all terms before the first step: the memory dry run must include the most expensive step
        self.weights = Weights(settings.consistency, settings.diversity, settings.singular)

    @property
    def requires(self) -> Requirement:
        return Requirement.TEACHER_OUTPUT if self.settings.consistency else Requirement.NONE

    def begin_step(self, step: StepInfo) -> None:
        self.weights = weights_at(self.settings, step.step, step.total)

    def output_loss(self, chunk: OutputChunk) -> Tensor | None:
        s, weights = self.settings, self.weights
        if not any(weights):
            return None
        z, teacher = chunk.logits.float(), chunk.teacher_logits
        if not z.isfinite().all():
            return None  # the step reports it with the rows; eigvalsh would only raise
        if s.classes:
            _require_tokens(s.classes, z.shape[-1])
            classes = torch.tensor(s.classes, device=z.device)
            is_label = torch.isin(chunk.targets, classes)
            if not is_label.any():
                return None
            z = z[is_label][:, classes]
            teacher = None if teacher is None else teacher[is_label][:, classes]
        loss = z.new_zeros(())
        if weights.consistency:
            assert teacher is not None, "BA-LoRA requires the teacher's logits"
            if s.classes:
                consistency = class_consistency(z, teacher.float())
            else:
                consistency = token_consistency(z, teacher, s.temperature)
            loss = loss + weights.consistency * consistency
        if weights.diversity:
            diversity = class_covariance(z) if s.classes else -top_entropy(z, s.top_k)
            loss = loss + weights.diversity * diversity
        if weights.singular:
            if s.classes:
                share = class_share(z, s.num_singular)
            else:
                share = frobenius_share(z, s.num_singular, s.centred)
            loss = loss - weights.singular * share
        return loss * len(z)


def _require_tokens(classes: list[int], vocabulary: int) -> None:
    if max(classes) >= vocabulary or min(classes) < 0:
        raise AdapterError(
            f"adapter.classes={classes}: token ids must be between 0 and {vocabulary - 1}. Look "
            "them up in the model's tokenizer, or leave classes empty for language modelling"
        )


# -- language modelling: z (tokens, vocabulary) ----------------------------------------------------


def token_consistency(z: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the mean KL(q || p) over the tokens, both at temperature T."""
    p = F.log_softmax(z / temperature, dim=-1)
    q = F.log_softmax(teacher.float() / temperature, dim=-1)  # no second fp32 copy is kept
    return temperature**2 * F.kl_div(p, q, reduction="batchmean", log_target=True)


def top_entropy(z: Tensor, top_k: int) -> Tensor:
    """Mean entropy of the renormalised `top_k` most likely tokens; within [0, log top_k]."""
    log_p = F.log_softmax(z.topk(min(top_k, z.shape[-1]), dim=-1).values, dim=-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def frobenius_share(z: Tensor, k: int, centred: bool = False) -> Tensor:
    """(s_1 + ... + s_k) / ||Z||_F of the logits; within [0, sqrt(k)]."""
    values = singular_values(z - z.mean(0) if centred else z)
    return values[:k].sum() / (values.square().sum() + TINY).sqrt()


# -- classification: z (rows, classes) -------------------------------------------------------------


def class_consistency(z: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the normalised rows; of the plain values for one class."""
    if z.shape[1] == 1:
        return F.mse_loss(z, teacher)
    return F.mse_loss(F.normalize(z, dim=1), F.normalize(teacher, dim=1))


def class_covariance(z: Tensor) -> Tensor:
    """(1 / classes) times the sum of the squared covariances between different classes."""
    if len(z) < 2:
        return z.sum() * 0.0
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    return off_diagonal.square().sum() / z.shape[1]


def class_share(z: Tensor, k: int) -> Tensor:
    """(s_1 + ... + s_k) / (sum of all singular values); within (0, 1]."""
    values = singular_values(z)
    return values[:k].sum() / (values.sum() + TINY)


def singular_values(z: Tensor) -> Tensor:
    """Singular values in descending order, from the smaller Gram matrix; differentiable."""
    gram = z @ z.T if len(z) <= z.shape[1] else z.T @ z
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=TINY).sqrt()
