"""Does this model behave as training assumes? A few tiny forwards on the loaded weights tell.

    behaviour = probe(CausalModel(model), facts.vocabulary, name)

| assumption                                       | if it does not hold                          |
|--------------------------------------------------|----------------------------------------------|
| a later token does not change an earlier output  | refused: not a causal language model         |
| a padded row gives what the row alone gives      | refused                                      |
| decoder and head give the model's own logits     | refused                                      |
| packed rows do not see each other                | rows are not packed (`Behaviour.packs`)      |

Packing relies on transformers' own mask, which separates rows whose position ids start again at 0.
Architectures that build another mask (OPT, Bloom, Falcon) or carry a state from token to token
(Mamba, LFM2, Qwen3-Next) do not use it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.seeds import generator
from qlora_lite.model.causal import CausalModel

ROW, NEXT = 6, 7
"""Tokens of the first packed row and of the second one."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest `distance` that is rounding: sums may be made in another order. It was 0.02 between two
batch sizes of SmolLM2-135M in bf16, 1e-5 in fp32."""

PACKED_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""The same for two rows of one batch: two roundings. It was 0 in bf16 in every architecture without
dependence on other rows, and 0.057 (DeepSeek V4) to 1.2 in the others."""

LOUD = 100.0
"""Size of the largest logit in the comparison of logits. A soft cap of 30 leaves logits below 10
almost as they are, and halves these."""


UNPACKED = frozenset(
    [
        # attention with a mask of its own
        *("afmoe", "biogpt", "bloom", "deepseek_v4", "falcon", "gpt_oss", "inkling2_text"),
        *("mpt", "openai-gpt", "opt", "reformer", "xglm"),
        # decoders of encoder-decoder models
        *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"),
        *("pegasus", "plbart", "trocr"),
        # a state that goes on from token to token
        *("bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba"),
        *("kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h"),
        *("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text"),
        *("recurrent_gemma", "rwkv", "zamba", "zamba2", "zaya"),
    ]
)
"""Architectures (`model_type`) whose packed rows see each other, for plans, which load no model.
A test probes every architecture of transformers."""


@dataclass(frozen=True)
class Behaviour:
    """What a model can do with rows."""

    packs: bool
    """Rows that share a bin do not see each other."""


@torch.no_grad()
def probe(
    model: CausalModel, vocabulary: int, name: str, compute: torch.dtype = torch.float32
) -> Behaviour:
    """Run the probes: three forwards of at most 4 x 13 tokens.

    Args:
        name: of the model, for messages.
        compute: dtype of the sums. Outputs may have another: norms are in fp32 on CPU.

    Raises:
        BaseModelError: if the model is not causal, padding changes its outputs, or its own logits
            are not those of decoder and head.
    """
    tolerance = TOLERANCE[compute]
    first, other, second = _rows(vocabulary)
    changed = torch.cat([second[:-1], second[-1:] + 1]) % vocabulary
    padding = torch.zeros(ROW, dtype=torch.int64)
    bins = [(first, second), (other, second), (second, padding), (changed, padding)]
    ids = torch.stack([torch.cat(pair) for pair in bins]).to(model.device)
    positions = torch.stack([_positions(pair) for pair in bins]).to(model.device)
    packed, beside_other, padded, last_changed = model.hidden(ids, positions).float()
    row, alone = second[None].to(model.device), _positions((second,))[None].to(model.device)
    hidden = model.hidden(row, alone)
    if not _agree(padded[: NEXT - 1], last_changed[: NEXT - 1], tolerance):
        raise BaseModelError(
            f"{name} is not a causal language model: a later token changes what it computes for "
            "earlier ones. Use a decoder such as Llama, Qwen or GPT-2"
        )
    if not _agree(padded[:NEXT], hidden[0].float(), tolerance):
        raise BaseModelError(
            f"{name} computes something else for a row with padding after it than for the row "
            "alone, so rows of different lengths cannot share a batch. This architecture is not "
            "supported"
        )
    _require_own_logits(model, row, alone, hidden, name, tolerance)
    return Behaviour(packs=_agree(packed[ROW:], beside_other[ROW:], PACKED_TOLERANCE[compute]))


def _require_own_logits(
    model: CausalModel,
    row: Tensor,
    positions: Tensor,
    hidden: Tensor,
    name: str,
    tolerance: float,
) -> None:
    """Compare logits, with the input of the head scaled so that the largest one is `LOUD`."""
    with model.head.gathered():
        factor = LOUD / (model.logits(hidden).float().abs().max().item() or LOUD)
    with model.head.gathered():
        ours = model.logits(factor * hidden).float()
    scaling = model.head.module.register_forward_pre_hook(
        lambda head, inputs: (factor * inputs[0], *inputs[1:])
    )
    try:
        own = model.module(input_ids=row, position_ids=positions, use_cache=False).logits.float()
    finally:
        scaling.remove()
    if (ours - own).norm() > tolerance * own.norm():
        raise BaseModelError(
            f"{name} computes its logits in a way that is not known here: its own differ from "
            "those of its decoder and head, so the loss would be wrong. This architecture is not "
            "supported"
        )


def _rows(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two different first rows, and the row after them."""
    draws = generator(0, "probe")
    first = torch.randint(vocabulary, (ROW,), generator=draws)
    other = (first + torch.randint(1, vocabulary, (ROW,), generator=draws)) % vocabulary
    return first, other, torch.randint(vocabulary, (NEXT,), generator=draws)


def _positions(rows: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([torch.arange(len(row)) for row in rows])


def _agree(a: Tensor, b: Tensor, tolerance: float) -> bool:
    # NaN counts as equal: damaged weights are for the checks of the loss, which name them
    return not distance(a, b) > tolerance


def distance(a: Tensor, b: Tensor) -> float:
    """How different the outputs are at the token where they differ most; both (tokens, channels).

    In every channel the difference is relative to the RMS of that channel, because trained models
    have a few channels that are a thousand times as large as the others. The median over channels
    counts: every output depends on all channels of the layer before.
    """
    size = torch.cat([a, b]).square().mean(0).sqrt().clamp(min=torch.finfo(a.dtype).tiny)
    return ((a - b).abs() / size).median(-1).values.max().item()
