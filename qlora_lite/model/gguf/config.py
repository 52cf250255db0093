"""Make the config of transformers from the metadata of a GGUF file.

config = config_from_gguf(read_header(path))

transformers reads such files as well, but leaves out what it does not know: the scaling of RoPE,
softcaps, multipliers, biases. Here every key of the architecture is read, or the file is refused.
"""

import math
from collections.abc import Callable
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.gguf.families import EMBEDDING, HEAD, Family, family_of
from qlora_lite.model.gguf.keys import ArchitectureKeys
from qlora_lite.model.gguf.rope import AUXILIARY, rope_parameters
from qlora_lite.shards.gguf.header import GgufHeader

Fields = dict[str, Any]


def config_from_gguf(header: GgufHeader) -> PretrainedConfig:
    """The config of the model in a GGUF file.

    Raises:
        BaseModelError: if the architecture is not supported, the file is damaged, or it has a key
            that might change the config and is not known.
    """
    family, keys = family_of(header), ArchitectureKeys(header)
    fields = _sizes(family, keys) | _special_tokens(header)
    if family.rope == "none":
        _require_no_rope(header)
    else:
        fields |= _positions(family, keys, fields)
    if family.model_type in _FURTHER:
        fields |= _FURTHER[family.model_type](keys, fields)
    keys.require_all_read()
    return _build(family, fields, header)


def _sizes(family: Family, keys: ArchitectureKeys) -> Fields:
    """What all architectures have."""
    tensors = keys.header.tensors
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    keys.require("block_count", len(blocks))
    shape = tensors[EMBEDDING].shape
    heads = keys.integer("attention.head_count")
    if len(shape) != 2 or shape[1] < heads:
        raise keys.wrong("attention.head_count", heads, f"an embedding wider than {list(shape)}")
    rows, hidden = shape
    keys.require("embedding_length", hidden)
    keys.require("vocab_size", rows)
    keys.require("attention.causal", True)
    keys.require("expert_count", 0)
    keys.require("expert_used_count", 0)
    fields: Fields = {
        "num_hidden_layers": len(blocks),
        "hidden_size": hidden,
        "vocab_size": rows,
        "num_attention_heads": heads,
        "max_position_embeddings": keys.integer("context_length"),
        "tie_word_embeddings": HEAD not in tensors,
        family.epsilon: _epsilon(keys),
    }
    width = 4 * hidden
    if family.feed_forward is None:
        keys.require("feed_forward_length", width)
    else:
        fields[family.feed_forward] = keys.integer("feed_forward_length")
    return (
        fields
        | _heads(family, keys, heads, hidden)
        | {field: keys.positive(key) for key, field in family.needed.items()}
        | {field: keys.positive(key) for key, field in family.optional.items() if key in keys}
        | {
            field: any(name.endswith(f".{tensor}") for name in tensors)
            for field, tensor in family.flags.items()
        }
    )


def _epsilon(keys: ArchitectureKeys) -> float:
    """Under either of two names, or under both with one value."""
    names = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
    found = [keys.positive(name) for name in names if name in keys]
    if not found or len(set(found)) > 1:
        raise keys.wrong(names[0], found or None, "one value, the epsilon of the norms,")
    return found[0]


def _heads(family: Family, keys: ArchitectureKeys, heads: int, hidden: int) -> Fields:
    """Numbers and size of the attention heads."""
    fields: Fields = {}
    if family.model_type == "lfm2":
        pass  # an array, with zeros for layers without attention
    elif family.kv_heads is None:
        keys.require("attention.head_count_kv", heads)
    else:
        fields[family.kv_heads] = keys.integer("attention.head_count_kv", heads)
    default = hidden // heads
    if family.has_head_dim:
        fields["head_dim"] = keys.integer("attention.key_length", default)
    else:
        keys.require("attention.key_length", default)
    keys.require("attention.value_length", fields.get("head_dim", default))
    return fields


def _special_tokens(header: GgufHeader) -> Fields:
    """Ids of the tokenizer. A generation ends at the end of the text and at the end of a turn."""

    def token(kind: str) -> int | None:
        value = header.metadata.get(f"tokenizer.ggml.{kind}_token_id")
        return value if type(value) is int else None

    ends = [token(kind) for kind in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return {
        "bos_token_id": token("bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": token("padding"),
    }


def _require_no_rope(header: GgufHeader) -> None:
    """Raises BaseModelError if a model without rotary embedding has factors for one."""
    for name in AUXILIARY:
        if name in header.tensors:
            raise BaseModelError(
                f"{header.files[0]} has the tensor {name!r}, and {header.architecture!r} has no "
                "rotary embedding. Use the safetensors version of this model"
            )


def _positions(family: Family, keys: ArchitectureKeys, fields: Fields) -> Fields:
    """The rotary embedding."""
    head_dim = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    context = fields["max_position_embeddings"]
    if family.rope == "partial":
        rotated = keys.integer("rope.dimension_count", head_dim)
    else:
        keys.require("rope.dimension_count", head_dim)
        rotated = head_dim
    if rotated % 2:
        raise keys.wrong("rope.dimension_count", rotated, "an even number")
    parameters = rope_parameters(keys, rotated, context)
    if family.rope == "per layer type":
        local = float(keys.positive("rope.freq_base_swa", 10_000.0))
        return {
            "rope_parameters": {
                "full_attention": parameters,
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            }
        }
    if family.rope == "partial":
        return {
            "rope_parameters": parameters,
            "partial_rotary_factor": _share(rotated, head_dim),
        }
    return {"rope_parameters": parameters}


def _share(rotated: int, head_dim: int) -> float:
    """The float with `int(share * head_dim) == rotated`."""
    share = rotated / head_dim
    return share if int(share * head_dim) == rotated else math.nextafter(share, 1)


def _gemma2(_: ArchitectureKeys, fields: Fields) -> Fields:
    # only the 27B model scales by the hidden size per head; the file does not say so
    return {"query_pre_attn_scalar": _query_scale(fields, wide_at_layers=46)}


def _gemma3(keys: ArchitectureKeys, fields: Fields) -> Fields:
    """Five layers with a window, then one without; or none with a window."""
    num_layers = fields["num_hidden_layers"]
    further: Fields = {"query_pre_attn_scalar": _query_scale(fields, wide_at_layers=62)}
    if "attention.sliding_window" not in keys:
        return further | {"layer_types": ["full_attention"] * num_layers}
    further["sliding_window"] = keys.integer("attention.sliding_window")
    name = "attention.sliding_window_pattern"
    if keys.is_array(name):
        pattern = keys.per_layer(name, num_layers)
    else:
        period = keys.integer(name, 6)
        pattern = [(i + 1) % period != 0 for i in range(num_layers)]
    types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return further | {"layer_types": types}


def _query_scale(fields: Fields, wide_at_layers: int) -> int:
    if fields["num_hidden_layers"] == wide_at_layers:
        return fields["hidden_size"] // fields["num_attention_heads"]
    return fields["head_dim"]


def _llama(keys: ArchitectureKeys, fields: Fields) -> Fields:
    """Files from Meta's own weights have the same order of rows as those from transformers'."""
    keys.require("tensor_data_layout", "Meta AI original pth")
    return {}


def _granite(keys: ArchitectureKeys, fields: Fields) -> Fields:
    """Multipliers of 0 are left out of the file, and mean the usual ones."""
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    return {
        "attention_multiplier": keys.positive("attention.scale", head_dim**-0.5),
        "embedding_multiplier": keys.positive("embedding_scale", 1.0),
        "residual_multiplier": keys.positive("residual_scale", 1.0),
    }


def _phi3(keys: ArchitectureKeys, fields: Fields) -> Fields:
    """A window of 0 is none. The original context is a field of the config itself."""
    window = keys.number("attention.sliding_window", 0)
    context = fields["max_position_embeddings"]
    original = keys.integer("rope.scaling.original_context_length", context)
    return {
        "sliding_window": keys.integer("attention.sliding_window") if window else None,
        "original_max_position_embeddings": original,
    }


def _stablelm(keys: ArchitectureKeys, fields: Fields) -> Fields:
    """Attention and MLP in parallel share a norm. The key is true in all files, and llama.cpp does
    not use it either."""
    keys.flag("use_parallel_residual", True)
    return {"use_parallel_residual": "blk.0.ffn_norm.weight" not in keys.header.tensors}


def _falcon(keys: ArchitectureKeys, fields: Fields) -> Fields:
    """Falcon 7B has one key head for all and one norm; 40B has groups and two norms, 11B groups
    and one norm."""
    keys.require("tensor_data_layout", "jploski")  # the order of rows that names.py undoes
    is_grouped = fields["num_kv_heads"] > 1
    norms = 2 if "blk.0.attn_norm_2.weight" in keys.header.tensors else 1
    return {
        "new_decoder_architecture": is_grouped,
        "num_ln_in_parallel_attn": norms if is_grouped else None,
    }


def _gpt2(keys: ArchitectureKeys, fields: Fields) -> Fields:
    """The usual width is None in the config."""
    return {"n_inner": None} if fields["n_inner"] == 4 * fields["hidden_size"] else {}


def _lfm2(keys: ArchitectureKeys, fields: Fields) -> Fields:
    """Layers without key heads are convolutions."""
    heads = keys.per_layer("attention.head_count_kv", fields["num_hidden_layers"])
    present = {count for count in heads if count}
    if len(present) != 1 or not all(type(count) is int for count in heads):
        raise keys.wrong("attention.head_count_kv", heads, "one number, or 0, for each layer")
    return {
        "num_key_value_heads": present.pop(),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "block_auto_adjust_ff_dim": False,
    }


_FURTHER: dict[str, Callable[[ArchitectureKeys, Fields], Fields]] = {
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "llama": _llama,
    "granite": _granite,
    "phi3": _phi3,
    "stablelm": _stablelm,
    "falcon": _falcon,
    "gpt2": _gpt2,
    "lfm2": _lfm2,
}
"""Fields that one family has, from its keys and the fields before."""


def _build(family: Family, fields: Fields, header: GgufHeader) -> PretrainedConfig:
    """The config object; its class checks types and contradictions."""
    try:
        config: PretrainedConfig = AutoConfig.for_model(
            family.model_type, architectures=[family.model_class], **fields
        )
    except Exception as error:  # strict dataclasses raise their own types
        raise BaseModelError(
            f"{header.files[0]}: transformers cannot use its metadata: {str(error)[:300]}. "
            "Download the file again, or use the safetensors version of this model"
        ) from error
    config.name_or_path = str(header.files[0])
    return config
