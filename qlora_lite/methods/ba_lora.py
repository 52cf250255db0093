"""BA-LoRA: PiSSA with three regularisers on the outputs.

    L = L_task + l1 consistency + l2 diversity + l3 singular values

They keep the outputs close to those of the pre-trained model, diverse, and dominated by few
directions. Chang et al. 2024, arXiv:2408.04556. Z are the logits, p = softmax(Z), and q is the
softmax of the frozen base:

    language modelling, over the n trained tokens of a chunk
        consistency   mean KL(q || p)
        diversity     - mean entropy of p among its `top_k` tokens
        singular      - (s_1 + ... + s_k) / ||Z||_F     of the centred logits (n, vocabulary)
    classification (`classes` are given), Z (n, classes) at the tokens whose target is a class
        consistency   mean squared difference of the rows of Z, each normalised to length 1
        diversity     (1 / classes) sum of squared off-diagonal covariances
        singular      - (s_1 + ... + s_k) / (sum of all s)

The teacher is the same model with the adapter disabled, so the base must be unchanged: `mode` can
only be `offset`. The teacher costs a second forward. Diversity and singular values are computed per
chunk of trained tokens, so they depend slightly on how a step is cut into micro-batches.

Where we deviate: we read the authors' first code in full; the constants of the later versions were
not found. For language modelling that code uses the whole vocabulary and padding positions; we use
trained tokens only, the entropy among the top 50, and the Frobenius norm (like the later versions,
according to their outline). It reads `size(1)` of a vector and cannot run as released. Our singular
values are exact, from the Gram matrix of a chunk of at most 256 tokens; the later versions estimate
them with random probes. With one class (a regression) the diversity is zero and the consistency
compares the plain values.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from qlora_lite.adapters.method import OutputChunk, Requirement
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.methods.pissa import PiSSA, PiSSAMethod

TINY = 1e-12
"""Added under roots and norms so that the gradient at zero is finite."""


class BALoRA(PiSSA):
    """Bias-alleviating adaptation: PiSSA with outputs close to the base, diverse and low-rank."""

    kind: Literal["ba_lora"] = "ba_lora"  # type: ignore[assignment]

    mode: Literal["offset"] = "offset"
    """Train increments and leave the base unchanged, because it is the teacher."""

    consistency: float = Field(default=1e-4, ge=0)
    """Weight of staying close to the outputs of the frozen base (lambda 1)."""

    diversity: float = Field(default=3e-4, ge=0)
    """Weight of keeping the outputs diverse (lambda 2)."""

    singular: float = Field(default=1e-4, ge=0)
    """Weight of concentrating the outputs in few singular directions (lambda 3)."""

    num_singular: int = Field(default=3, ge=1)
    """Number of dominant singular values (k)."""

    top_k: int = Field(default=50, ge=2)
    """The entropy is that of the `top_k` most likely tokens."""

    classes: list[int] = Field(default_factory=list)
    """Token ids of the class labels, for classification; empty for language modelling. The terms
    then use only tokens whose target is a label, and are weighted by their share of all trained
    tokens."""


class BALoRAMethod(PiSSAMethod):
    """Adds the regularisers to the loss of every chunk."""

    settings: BALoRA
    logit_copies = 8

    @property
    def requires(self) -> Requirement:
        return Requirement.TEACHER_OUTPUT if self.settings.consistency else Requirement.NONE

    def output_loss(self, chunk: OutputChunk) -> Tensor | None:
        s = self.settings
        if not (s.consistency or s.diversity or s.singular):
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
        if s.consistency:
            assert teacher is not None, "BA-LoRA requires the teacher's logits"
            consistency = class_consistency if s.classes else token_consistency
            loss = loss + s.consistency * consistency(z, teacher.float())
        if s.diversity:
            diversity = class_covariance(z) if s.classes else -top_entropy(z, s.top_k)
            loss = loss + s.diversity * diversity
        if s.singular:
            share = class_share if s.classes else frobenius_share
            loss = loss - s.singular * share(z, s.num_singular)
        return loss * len(z)


def _require_tokens(classes: list[int], vocabulary: int) -> None:
    if max(classes) >= vocabulary or min(classes) < 0:
        raise AdapterError(
            f"adapter.classes={classes}: token ids must be between 0 and {vocabulary - 1}. Look "
            "them up in the model's tokenizer, or leave classes empty for language modelling"
        )


# -- language modelling: z (tokens, vocabulary) ----------------------------------------------------


def token_consistency(z: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(q || p) over the tokens."""
    p, q = F.log_softmax(z, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(p, q, reduction="batchmean", log_target=True)


def top_entropy(z: Tensor, top_k: int) -> Tensor:
    """Mean entropy of the renormalised `top_k` most likely tokens; within [0, log top_k]."""
    log_p = F.log_softmax(z.topk(min(top_k, z.shape[-1]), dim=-1).values, dim=-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def frobenius_share(z: Tensor, k: int) -> Tensor:
    """(s_1 + ... + s_k) / ||Z||_F of the centred logits; within [0, sqrt(k)]."""
    values = singular_values(z - z.mean(0))
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
