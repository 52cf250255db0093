"""A causal language model in two parts: decoder (hidden states) and head (logits)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_lite.model.head import Head
from qlora_lite.model.towers import text_tower


class CausalModel:
    """A transformers model, split before its head."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.head = Head(module)
        self.decoder = text_tower(module)
        self.after_decoder: Callable[[], None] = lambda: None
        """Called before `hidden` returns, in training and in scoring."""

    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, hidden), before the head.

        Position ids that restart at 0 separate packed documents.
        """
        output = self.decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        states: Tensor = output.last_hidden_state
        self.after_decoder()
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary), with the model's own scale and soft-cap."""
        return self.head.logits(hidden)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def head_is_trained(self) -> bool:
        return any(p.requires_grad for p in self.head.parameters())
