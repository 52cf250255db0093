"""From hidden states to logits, as each architecture does it.

    logits = cap * tanh(s / cap),   s = head(hidden) * multiplier / divisor

Which of the three a model has is read from its config (`MULTIPLIERS`, `DIVISORS`, `CAPS`), and
every loaded model is checked (`probes.py`). The decoder and the head are called separately, so that
logits need not be computed for all tokens at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.foundation.partitioned import is_partitioned, whole

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Cohere, Falcon-H1."""
DIVISORS = ("logits_scaling",)
"""Granite."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Gemma 2, RecurrentGemma."""


class Head:
    """The output head of a causal language model."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        self._model = model
        self.multiplier = _first(config, MULTIPLIERS)
        self.divisor = _first(config, DIVISORS)
        self.cap = _first(config, CAPS)

    @property
    def module(self) -> nn.Module:
        """The current head: attaching an adapter may have replaced it."""
        module: nn.Module = self._model.get_output_embeddings()
        return module

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the head."""
        return self.module.parameters()

    def gathered(self) -> AbstractContextManager[Any]:
        """Inside, `logits` may be called any number of times. Collective if ZeRO divides the head
        among processes: these may have different numbers of trained tokens."""
        return whole(self.parameters())

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary)"""
        module = self.module
        # DeepSpeed would gather and release the weight in every call of a module; `gathered` does
        # that once
        is_divided = any(is_partitioned(p) for p in module.parameters())
        logits: Tensor = module.forward(hidden) if is_divided else module(hidden)
        if self.multiplier is not None:
            logits = logits * self.multiplier
        if self.divisor is not None:
            logits = logits / self.divisor
        return logits if self.cap is None else soft_cap(logits, self.cap)


def _first(config: Any, names: Sequence[str]) -> float | None:
    """The first of these settings that the config has."""
    return next((v for name in names if (v := getattr(config, name, None)) is not None), None)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """Limit logits smoothly to (-cap, cap)."""
    return torch.tanh(logits / cap) * cap
