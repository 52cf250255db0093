"""Find, for each parameter of a model, the tensor of a GGUF file that it comes from.

sources = tensor_sources(header, config, {"model.norm.weight": (64,), ...})

The names come from the table of the `gguf` package. llama.cpp changes some weights when it writes a
file; each `TensorSource` undoes that.
"""

from collections.abc import Mapping
from functools import cache

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from torch import Tensor
from transformers.configuration_utils import PretrainedConfig

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.gguf.families import HEAD
from qlora_lite.model.gguf.rope import AUXILIARY
from qlora_lite.shards.gguf.checkpoint import TensorSource
from qlora_lite.shards.gguf.header import GgufHeader

SHIFTED = ("gemma", "gemma2", "gemma3", "nemotron")
"""Architectures whose norms multiply by 1 + weight; files have 1 + weight."""

TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
"""Weights that GPT-2 has as (d_in, d_out); files have (d_out, d_in)."""


def tensor_sources(
    header: GgufHeader, config: PretrainedConfig, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorSource]:
    """The source of every parameter; a head that is tied to the embedding has none.

    Args:
        config: made from the same header.
        parameters: names and shapes in the model.

    Raises:
        BaseModelError: naming a parameter without a tensor, a tensor without a parameter, or a
            tensor of another shape.
    """
    spellings = _spellings(header, config, parameters)
    sources = {}
    for name, shape in parameters.items():
        stored = spellings[name]
        if stored == HEAD and HEAD not in header.tensors and config.tie_word_embeddings:
            continue
        if stored not in header.tensors:
            raise BaseModelError(
                f"{header.files[0]} has no tensor {stored!r}, which is needed for {name}. It is "
                "incomplete: download it again, or use the safetensors version of this model"
            )
        sources[name] = _source(stored, name, shape, header.architecture, config)
        _require_shape(header, stored, sources[name], shape)
    _require_all_used(header, [source.stored for source in sources.values()])
    return sources


def _spellings(
    header: GgufHeader, config: PretrainedConfig, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The name in the file of each parameter. Files made from a bare decoder lack the prefix of its
    names (Bloom); the table has no head for families that always tie it (Gemma)."""
    architecture = {name: key for key, name in MODEL_ARCH_NAMES.items()}[header.architecture]
    table = get_tensor_name_map(architecture, config.num_hidden_layers)
    spellings = {}
    for name in parameters:
        if name == "lm_head.weight":
            spellings[name] = HEAD
            continue
        stem, _, ending = name.rpartition(".")
        found = table.get_name(stem) or table.get_name(stem.partition(".")[2])
        assert found is not None, f"{header.architecture} has no name for {name}"
        spellings[name] = f"{found}.{ending}"
    return spellings


def _source(
    stored: str,
    name: str,
    shape: tuple[int, ...],
    architecture: str,
    config: PretrainedConfig,
) -> TensorSource:
    """How the parameter is made from the stored tensor."""
    if architecture in SHIFTED and name.endswith("norm.weight"):
        return TensorSource(stored, add=-1.0)
    if architecture == "gpt2" and stored.endswith(TRANSPOSED):
        return TensorSource(stored, transposed=True)
    if architecture == "lfm2" and stored.endswith("shortconv.conv.weight"):
        return TensorSource(stored, shape=shape)
    return TensorSource(stored, row_order=_row_order(stored, shape[0], architecture, config))


def _row_order(
    stored: str, rows: int, architecture: str, config: PretrainedConfig
) -> Tensor | None:
    """For each row of the parameter, its row in the file; None if the order is the same."""
    heads = config.num_attention_heads
    if architecture in ("llama", "granite") and ".attn_q." in stored:
        return _halves_from_pairs(heads, rows // heads)
    if architecture in ("llama", "granite") and ".attn_k." in stored:
        return _halves_from_pairs(config.num_key_value_heads, rows // config.num_key_value_heads)
    if architecture == "bloom" and ".attn_qkv." in stored:
        return _grouped(heads, heads, config.hidden_size // heads)
    if architecture == "falcon" and ".attn_qkv." in stored:
        return _grouped(heads, config.num_kv_heads, config.hidden_size // heads)
    return None


@cache
def _halves_from_pairs(heads: int, head_dim: int) -> Tensor:
    """Rotary embedding: files have the two rows of each rotated pair next to each other, the model
    has the first of all pairs of a head, then the second."""
    rows = torch.arange(heads * head_dim).view(heads, head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)


@cache
def _grouped(heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """Fused projection: files have the rows of all queries, all keys, all values, the model has for
    each group its queries, key and value."""
    rows = torch.arange((heads + 2 * kv_heads) * head_dim)
    q, k, v = rows.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
    return torch.cat([part.view(kv_heads, -1) for part in (q, k, v)], dim=1).reshape(-1)


def _require_shape(
    header: GgufHeader, stored: str, source: TensorSource, shape: tuple[int, ...]
) -> None:
    """Raises BaseModelError if the stored tensor has another shape than the parameter needs."""
    found = header.tensors[stored].shape
    needed = shape[::-1] if source.transposed else shape
    if source.shape is not None:
        needed = tuple(size for size in shape if size != 1)
        found = tuple(size for size in found if size != 1)
    if found != needed:
        raise BaseModelError(
            f"{header.files[0]}: {stored} has the shape {list(header.tensors[stored].shape)}, and "
            f"its metadata needs {list(needed)}. Download the file again"
        )


def _require_all_used(header: GgufHeader, used: list[str]) -> None:
    """Raises BaseModelError if a tensor is used twice or not at all."""
    assert len(set(used)) == len(used), "two parameters with one source"
    for name in header.tensors.keys() - used:
        if name not in AUXILIARY:
            raise BaseModelError(
                f"{header.files[0]} has the tensor {name!r}, which transformers' model of "
                f"{header.architecture!r} does not have. Use the safetensors version of this model"
            )
