"""Tokenizers from GGUF metadata equal the original ones: ids, special tokens, templates.

Real tokenizers are written as llama.cpp's converter writes them, and read back.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.model.gguf.tokenizer import KNOWN_SPLITS, stop_ids, tokenizer_from_gguf
from qlora_lite.shards.gguf.header import GgufHeader, read_header
from tests.data.real_tokenizers import real_tokenizer

TEXTS = (
    "Hello  world! 123 + 4567 = 4690",
    "def f(x):\n\treturn x**2  # naïve café\n\n\n",
    "   leading and trailing   ",
    "don't you'll I'M 你好，世界 Ωμέγα 🎉👩‍🚀",
    "a1 1a 12.5% $3,000.00 <html> [INST] <|x|>",
)
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def header_of(tokenizer: PreTrainedTokenizerFast, folder: Path, split: str, **keys) -> GgufHeader:
    """A vocabulary-only model with one tensor, as the converter of llama.cpp writes BPE."""
    backend = tokenizer.backend_tokenizer
    added = tokenizer.added_tokens_decoder
    tokens = [backend.id_to_token(i) or f"[PAD{i}]" for i in range(len(tokenizer))]
    kinds = [NORMAL] * len(tokens)
    for index, token in added.items():
        kinds[index] = CONTROL if token.special else USER_DEFINED
    merges = [" ".join(pair) for pair in _merges(backend)]
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    if split:
        writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    for key, value in keys.items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, _type_of(value))
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(folder / "model.gguf")


def _merges(backend):
    return [
        pair.split(" ") if isinstance(pair, str) else pair
        for pair in json.loads(backend.to_str())["model"]["merges"]
    ]


def _type_of(value):
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
    return kinds.get(type(value), gguf.GGUFValueType.STRING)


def bytes_only() -> Tokenizer:
    """Every byte is a token, and one pair; there are no others."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerFast:
    return real_tokenizer("qwen3")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("qwen3", "qwen2"),
        ("qwen3", "stablelm2"),
        pytest.param("llama3", "llama-bpe", marks=pytest.mark.slow),
        pytest.param("llama3_1", "llama3", marks=pytest.mark.slow),
    ],
)
def test_ids_are_those_of_the_original(name, split, tmp_path):
    original = real_tokenizer(name)
    adds_bos = original("a").input_ids[0] == original.bos_token_id
    found = tokenizer_from_gguf(header_of(original, tmp_path, split, add_bos_token=adds_bos))
    for text in TEXTS:
        assert found(text).input_ids == original(text).input_ids, text
        assert found.decode(found(text).input_ids) == original.decode(original(text).input_ids)
    assert found.special_tokens_map == {
        k: v for k, v in original.special_tokens_map.items() if k in found.special_tokens_map
    }
    assert found.eos_token_id == original.eos_token_id
    messages = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Yes."}]
    for tokenizer in (found, original):
        tokenizer.chat_template = original.chat_template
    assert found.apply_chat_template(messages) == original.apply_chat_template(messages)


@pytest.mark.real
def test_the_real_smollm2_splits_digits_as_it_was_trained(real_base):
    """Ids as the original tokenizer of SmolLM2 gives them."""
    tokenizer = tokenizer_from_gguf(read_header(real_base))
    assert tokenizer("Hello world! 123").input_ids == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer("  multiple   spaces").input_ids == [216, 2701, 256, 5600]
    assert tokenizer("Café déjà vu.").input_ids == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template.startswith("{% for message in messages %}")


def test_digits_are_single_pieces_where_the_vocabulary_was_trained_so(tmp_path, qwen):
    """GPT-2's split keeps a number whole, so a vocabulary with '12' would merge it."""
    header = header_of(qwen, tmp_path, "smollm")
    pieces = tokenizer_from_gguf(header).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 123")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "1", "2", "3"]


@pytest.mark.parametrize(
    ("split", "text", "pieces"),
    [
        ("gpt-2", "a 123, b", ["a", "Ġ123", ",", "Ġb"]),
        ("bloom", "a 123, b", ["a", "Ġ123", ",", "Ġb"]),
        ("falcon", "a 1234,b", ["a", "Ġ", "123", "4", ",", "b"]),
        ("qwen2", "a 12,b", ["a", "Ġ", "1", "2", ",b"]),
    ],
)
def test_each_split_cuts_text_as_its_name_says(split, text, pieces, tmp_path, qwen):
    tokenizer = tokenizer_from_gguf(header_of(qwen, tmp_path, split))
    found = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in found] == pieces


@pytest.mark.parametrize("split", ["", "default", "deepseek-llm", "unheard-of"])
def test_an_unknown_split_is_refused(split, tmp_path, qwen):
    header = header_of(qwen, tmp_path, split)
    with pytest.raises(BaseModelError, match=r"tokenizer\.ggml\.pre.*not known.*original model"):
        tokenizer_from_gguf(header)


def test_bos_is_added_by_the_flag_or_by_the_family(tmp_path, qwen):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=qwen.backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    cases = (
        ("llama-bpe", {}, True),
        ("qwen2", {}, False),
        ("qwen2", {"add_bos_token": True}, True),
    )
    for number, (split, keys, adds) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = tokenizer_from_gguf(header_of(tokenizer, folder, split, **keys))
        assert (found("Hi").input_ids[0] == found.bos_token_id) is adds


def test_several_chat_templates_keep_their_names(tmp_path, qwen):
    header = header_of(qwen, tmp_path, "qwen2")
    both = {"tokenizer.chat_template": "{{ 1 }}", "tokenizer.chat_template.tool_use": "{{ 2 }}"}
    header = GgufHeader(**{**vars(header), "metadata": dict(header.metadata) | both})
    assert tokenizer_from_gguf(header).chat_template == {
        "default": "{{ 1 }}",
        "tool_use": "{{ 2 }}",
    }


def test_every_end_of_a_turn_stops_an_answer(tmp_path, qwen):
    header = header_of(qwen, tmp_path, "qwen2", eot_token_id=7, eom_token_id=9)
    assert stop_ids(header) == [qwen.eos_token_id, 7, 9]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("bos_token_id", 10**6, r"tokenizer\.ggml\.bos_token_id is 1000000, and it has \d+ tokens"),
        ("eos_token_id", 10**6, r"tokenizer\.ggml\.eos_token_id is 1000000"),
        ("eot_token_id", 10**6, r"tokenizer\.ggml\.eot_token_id is 1000000"),
        ("eos_token_id", "x", "vocabulary cannot be used"),
        ("model", "bert", "vocabulary cannot be used"),
    ],
)
def test_damaged_vocabularies_are_one_error(key, value, reason, tmp_path, qwen):
    header = header_of(qwen, tmp_path, "qwen2")
    damaged = dict(header.metadata) | {f"tokenizer.ggml.{key}": value}
    header = GgufHeader(**{**vars(header), "metadata": damaged})
    with pytest.raises(BaseModelError, match=reason):
        tokenizer_from_gguf(header)


def test_a_file_without_a_vocabulary_is_named(tmp_path, qwen):
    header = header_of(qwen, tmp_path, "qwen2")
    header = GgufHeader(**{**vars(header), "arrays": {}})
    with pytest.raises(BaseModelError, match=r"model\.gguf has no vocabulary"):
        tokenizer_from_gguf(header)


def test_known_splits_are_all_used():
    assert {"gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "bloom", "falcon"} <= KNOWN_SPLITS


def test_tokens_that_transformers_adds_and_the_file_lacks_are_removed(tmp_path):
    plain = PreTrainedTokenizerFast(tokenizer_object=bytes_only(), eos_token="Ā")
    tokenizer = tokenizer_from_gguf(header_of(plain, tmp_path, "qwen2"))
    assert len(tokenizer) == len(plain) == 257
    assert tokenizer("abc").input_ids == plain("abc").input_ids


@pytest.mark.parametrize(("adds_space", "pieces"), [(True, ["▁ab", "▁a"]), (False, ["ab", "▁a"])])
def test_a_sentencepiece_vocabulary_starts_a_text_with_a_space_unless_it_says_no(
    adds_space, pieces, tmp_path
):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "▁ab"]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([2, CONTROL, CONTROL, *[NORMAL] * 6])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(adds_space)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = tokenizer_from_gguf(read_header(tmp_path / "model.gguf"))
    assert tokenizer.tokenize("ab a") == pieces
    assert tokenizer.decode(tokenizer("ab a").input_ids) == "ab a"
