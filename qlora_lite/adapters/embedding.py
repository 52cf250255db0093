"""LoRA on the input embedding.

    y = E[ids] + s B A[:, ids]          A (r, vocabulary),  B (hidden, r)

Hu et al. 2021 in PEFT's layout: A starts at zero and B Gaussian, so the first output is the
base's, bit for bit. A head that is tied to the embedding keeps the frozen embedding, without LoRA.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.adapters.layer import Factors
from qlora_lite.model.frozen import FrozenEmbedding


class LoRAEmbedding(nn.Module):
    """A frozen embedding and its low-rank update. Takes the place of the embedding."""

    def __init__(self, base: FrozenEmbedding, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.scale = scale
        self.enabled = True

    @classmethod
    def at_start(
        cls, base: FrozenEmbedding, rank: int, scale: float, generator: torch.Generator
    ) -> "LoRAEmbedding":
        """A zero, B Gaussian."""
        vocabulary, hidden = base.num_embeddings, base.embedding_dim
        b = torch.randn(hidden, rank, generator=generator)
        return cls(base, torch.zeros(rank, vocabulary), b, scale)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., hidden)"""
        if not self.enabled:
            return self.base(ids)
        rows = self.base.rows(ids)
        low = F.embedding(ids, self.a.T).to(rows.dtype)
        return self.base.scaled(rows + F.linear(low, self.b.to(rows.dtype)) * self.scale)

    def delta(self) -> Tensor:
        """What merging adds to the embedding, (vocabulary, hidden) in fp32."""
        return self.scale * (self.a.detach().float().T @ self.b.detach().float().T)

    def factors(self) -> Factors:
        """The folded pair: down (r, vocabulary), up (hidden, r)."""
        return Factors(self.a.detach().float(), self.scale * self.b.detach().float())

    def trained(self) -> dict[str, nn.Parameter]:
        return {"a": self.a, "b": self.b}
