"""Which modules are linear layers: those are quantised and get adapters.

| module                                          | why                                          |
|-------------------------------------------------|----------------------------------------------|
| `nn.Linear`, `Conv1D` (stored as d_in, d_out)   | yes: y = x W^T + bias                        |
| a subclass in `PLAIN_SUBCLASSES`                | yes: it computes the same                    |
| any other subclass, such as a router            | no: its forward differs                      |
| a layer in `READ_DIRECTLY`                      | no: other code reads its weight              |
"""

from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

PLAIN_SUBCLASSES = ("FalconLinear",)
"""Subclasses of nn.Linear that compute the same."""

_INDEXERS = ("AXK2Indexer", "DeepseekV32Indexer", "Dots3NoteTextIndexer", "GlmMoeDsaIndexer")

READ_DIRECTLY: dict[str, frozenset[str]] = {
    **dict.fromkeys((*_INDEXERS, "HYV4Indexer"), frozenset({"weights_proj"})),
    "FalconMambaMixer": frozenset({"dt_proj"}),
    "Gemma3nTextAltUp": frozenset({"correction_coefs", "prediction_coefs"}),
    "HunYuanMoEV1Gate": frozenset({"wg"}),
    "JambaMambaMixer": frozenset({"dt_proj"}),
    "LongcatFlashTopkRouter": frozenset({"classifier"}),
    "LSHSelfAttention": frozenset({"query_key", "value"}),
    "MambaMixer": frozenset({"dt_proj"}),
}
"""By class: linear layers whose weight its code reads instead of calling the layer, or whose dtype
it casts to. Packed codes and adapters would not be seen there."""


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every linear layer that can be quantised and adapted."""
    for parent_path, parent in model.named_modules():
        read = READ_DIRECTLY.get(type(parent).__name__, ())
        for name, module in parent.named_children():
            if name not in read and _is_linear(module):
                yield f"{parent_path}.{name}" if parent_path else name, module


def _is_linear(module: nn.Module) -> bool:
    is_plain = type(module) in (nn.Linear, Conv1D)
    return is_plain or (isinstance(module, nn.Linear) and type(module).__name__ in PLAIN_SUBCLASSES)
