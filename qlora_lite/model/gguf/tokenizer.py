"""The tokenizer that a GGUF file describes.

A GGUF file has a vocabulary, merges and special token ids, and names how llama.cpp splits text
before the merges (`tokenizer.ggml.pre`). `transformers` builds the tokenizer; what it leaves out is
added here: splits that it does not know, which would tokenise numbers and punctuation wrongly,
`ignore_merges`, and the space in front of a text.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    convert_gguf_tokenizer,
)

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.gguf.header import GgufHeader

GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2", "exaone4", "trillion", "granite-docling")
"""Split as GPT-2 does."""

DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Split as GPT-2 does, and every digit is a piece of its own."""

QWEN2 = ("stablelm2", "hunyuan")
"""Split as Qwen2 does, under a name that transformers does not know."""

BLOOM = ("bloom", "poro-chat", "gpt3-finnish")
_BLOOM_SPLIT = r" ?[^(\s|.,!?…。，、।۔،)]+"

FALCON = ("falcon",)

WHOLE_WORDS_FIRST = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("jina-v5-nano", "tekken"),
)
"""A piece that is in the vocabulary is one token, whatever its merges give; these vocabularies also
start with BOS unless the file has a flag."""

KNOWN_SPLITS = frozenset((*GGUF_PRE_TOKENIZER_SPLITS, *GPT2, *DIGITS, *QWEN2, *BLOOM, *FALCON))

_ID_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_from_gguf(header: GgufHeader) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a GGUF file, with its special tokens and chat templates.

    Raises:
        BaseModelError: if the file has no vocabulary, one of an unknown kind, or text would be
            split in a way that is not known here.
    """
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind is None or not header.array_lengths.get("tokenizer.ggml.tokens"):
        raise BaseModelError(
            f"{header.files[0]} has no vocabulary (tokenizer.ggml.tokens). Use a GGUF file that "
            "llama.cpp can chat with, or the original model directory"
        )
    _require_ids_in_range(header)
    split = _split(header, kind)
    parts = _parts(header, kind)
    try:
        backend, _ = convert_gguf_tokenizer(header.architecture, parts)
        backend = _without_defaults(backend, len(parts["tokens"]))
        _set_split(backend, split, parts["tokens"])
        _set_space(backend, header, kind)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **_settings(header, split))
    except Exception as error:  # a vocabulary is foreign data, and tokenizers raises any of them
        raise BaseModelError(_damaged(header, f"{type(error).__name__}: {error}")) from error
    _require_same_ids(tokenizer, header, parts)
    return tokenizer


def stop_ids(header: GgufHeader) -> list[int]:
    """The ids that end an answer: end of text, of a turn, and of a message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [header.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(value for value in found if isinstance(value, int)))


def _require_ids_in_range(header: GgufHeader) -> None:
    """Check that special tokens are in the vocabulary.

    Raises:
        BaseModelError: naming the key and its id.
    """
    count = header.array_lengths["tokenizer.ggml.tokens"]
    for key in (*_ID_KEYS.values(), "eot_token_id", "eom_token_id"):
        index = header.metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(index, int) and not 0 <= index < count:
            raise BaseModelError(
                _damaged(header, f"tokenizer.ggml.{key} is {index}, and it has {count} tokens")
            )


def _split(header: GgufHeader, kind: str) -> str:
    """The name of the split; SentencePiece vocabularies have none.

    Raises:
        BaseModelError: if it is unknown.
    """
    if kind != "gpt2":
        return ""
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name not in KNOWN_SPLITS:
        raise BaseModelError(
            f"{header.files[0]} splits text by tokenizer.ggml.pre={name!r}, which is not known "
            "here: it would be tokenised wrongly. Use the original model directory as base.model"
        )
    return str(name)


def _parts(header: GgufHeader, kind: str) -> dict[str, Any]:
    """What `convert_gguf_tokenizer` reads, under its names."""
    parts: dict[str, Any] = {"tokenizer_type": kind}
    for key in ("tokens", "scores", "token_type", "merges"):
        if header.array_lengths.get(f"tokenizer.ggml.{key}"):
            parts[key] = header.array(f"tokenizer.ggml.{key}")
    parts["pre_tokenizer_type"] = header.metadata.get("tokenizer.ggml.pre")
    for key in ("scores", "token_type"):
        if key in parts and len(parts[key]) != len(parts["tokens"]):
            raise BaseModelError(
                _damaged(header, f"{len(parts[key])} {key} for {len(parts['tokens'])} tokens")
            )
    return parts


def _without_defaults(backend: Tokenizer, num_tokens: int) -> Tokenizer:
    """Remove tokens that the class of transformers adds by default, such as <|endoftext|>, and the
    file does not have: the embedding has no rows for them."""
    if backend.get_vocab_size() <= num_tokens:
        return backend
    content = json.loads(backend.to_str())
    kept = [token for token in content["added_tokens"] if token["id"] < num_tokens]
    return Tokenizer.from_str(json.dumps(content | {"added_tokens": kept}))


def _set_split(backend: Tokenizer, split: str, tokens: list[str]) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split in DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), byte_level]
    elif split in QWEN2:
        qwen = Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"])
        steps = [pre_tokenizers.Split(qwen, "isolated"), bytes_only]
    elif split in BLOOM:
        steps = [pre_tokenizers.Split(Regex(_BLOOM_SPLIT), "isolated"), bytes_only]
    elif split in FALCON:
        steps = [
            pre_tokenizers.Punctuation("contiguous"),
            byte_level,
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split in WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True


def _set_space(backend: Tokenizer, header: GgufHeader, kind: str) -> None:
    """Leave out the space that SentencePiece puts in front of a text, if the file says so."""
    is_metaspace = isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace)
    adds_space = header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    if kind == "llama" and is_metaspace and not adds_space:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )


def _settings(header: GgufHeader, split: str) -> dict[str, Any]:
    """Special tokens, what is added to a text, and the chat templates."""
    tokens = header.array("tokenizer.ggml.tokens")
    metadata = header.metadata
    found: dict[str, Any] = {
        name: tokens[metadata[f"tokenizer.ggml.{key}"]]
        for name, key in _ID_KEYS.items()
        if f"tokenizer.ggml.{key}" in metadata
    }
    starts_with_bos = split in WHOLE_WORDS_FIRST or metadata["tokenizer.ggml.model"] == "llama"
    found["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", starts_with_bos)
    found["add_eos_token"] = metadata.get("tokenizer.ggml.add_eos_token", False)
    if templates := _chat_templates(metadata):
        found["chat_template"] = templates
    return found


def _chat_templates(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or all of them by name if there are several."""
    key = "tokenizer.chat_template"
    named = {
        name.removeprefix(f"{key}."): value
        for name, value in metadata.items()
        if name.startswith(f"{key}.")
    }
    default = metadata.get(key)
    if not named:
        return default
    return named if default is None else {"default": default, **named}


def _require_same_ids(
    tokenizer: PreTrainedTokenizerFast, header: GgufHeader, parts: Mapping[str, Any]
) -> None:
    """Check that special tokens kept their ids: the rows of the embedding belong to them.

    Raises:
        BaseModelError: naming a token with another id.
    """
    tokens = parts["tokens"]
    for name, key in _ID_KEYS.items():
        if f"tokenizer.ggml.{key}" in header.metadata:
            index, found = header.metadata[f"tokenizer.ggml.{key}"], getattr(tokenizer, name)
            if tokenizer.convert_tokens_to_ids(found) != index:
                raise BaseModelError(_damaged(header, f"{name} {found!r} is not token {index}"))
    if len(tokenizer) > len(tokens):
        raise BaseModelError(
            _damaged(header, f"{len(tokenizer)} tokens are needed, and it has {len(tokens)}")
        )


def _damaged(header: GgufHeader, reason: str) -> str:
    return (
        f"{header.files[0]}: its vocabulary cannot be used ({reason.splitlines()[0]}). Download "
        "it again, or use the original model directory"
    )
