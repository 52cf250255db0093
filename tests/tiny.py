"""Tiny models of real architectures: two layers, random weights, a tokenizer made on the spot.

    directory = save_tiny(tmp_path / "base", "llama", num_shards=3)

A directory has the files of a hub snapshot: config.json, safetensors (in `num_shards` files), a
byte-level BPE tokenizer with a chat template and distinct bos, eos and pad tokens. Every random
number depends on `seed`.
"""

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 400
BOS, EOS, PAD, ROLE = "<|begin|>", "<|end|>", "<|pad|>", "<|role|>"

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "llama": _COMMON
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "qwen2": _COMMON,
    "qwen3": _COMMON | {"head_dim": 16},
    "mistral": _COMMON | {"sliding_window": 16},
    "gemma2": _COMMON | {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": _COMMON | {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "granite": _COMMON | {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    "cohere": _COMMON | {"logit_scale": 0.25},
    "phi3": _COMMON,
    "mixtral": _COMMON | {"num_local_experts": 4, "sliding_window": 16},
}


def save_tiny(
    directory: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    tied: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a tiny model of `family` and its tokenizer; `config` overrides single fields."""
    model = tiny_model(family, dtype=dtype, tied=tied, seed=seed, **config)
    shard_bytes = max(_shard_bytes(model, num_shards), 1)
    model.save_pretrained(directory, max_shard_size=shard_bytes)
    tiny_tokenizer().save_pretrained(directory)
    assert len(list(directory.glob("*.safetensors"))) == num_shards
    return directory


def tiny_model(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    seed: int = 0,
    **config: Any,
) -> Any:
    """The model alone, in evaluation mode.

    Matrices have a standard deviation of 1/sqrt(hidden), so that logits differ by about 1: the
    loss is near ln(vocabulary), but differs between tokens.
    """
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    settings = FAMILIES[family] | {"tie_word_embeddings": tied} | tokens | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
    generator = torch.Generator().manual_seed(seed)
    std = 1 / math.sqrt(model.config.hidden_size)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * std)
            else:
                parameter.add_(noise * 0.1)
    return model.to(dtype).eval()


def _shard_bytes(model: Any, num_shards: int) -> int:
    """A limit under which a greedy writer fills exactly `num_shards` files."""
    sizes = [
        t.numel() * t.element_size()
        for name, t in model.state_dict().items()
        if not (model.config.tie_word_embeddings and name == "lm_head.weight")
    ]
    for limit in range(sum(sizes), 0, -max(sum(sizes) // 200, 1)):
        count, used = 1, 0
        for size in sizes:
            if used and used + size > limit:
                count, used = count + 1, 0
            used += size
        if count == num_shards:
            return limit
    raise ValueError(f"no limit gives {num_shards} shards")


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|role|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)

_TEXT = """The weather report says that it will rain in the morning and that the sun will return in
the afternoon. Question: what is the capital of France? Answer: the capital of France is Paris.
When she arrived at the station, the train had already left; she waited for another one, reading a
book about the history of numbers. A number is even if it can be divided by two without a rest.
How many apples are in the basket, if there were twelve and the children have eaten five of them?
There are seven apples left. The restaurant near the river serves English food at a moderate price.
def add(first, second): return first + second. Please write a short sentence about the mountains
and another sentence about the sea. The user asks, and the assistant answers as well as it can."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `VOCABULARY` tokens; encoding puts bos in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, ROLE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[ROLE],
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    assert len(fast) == VOCABULARY
    return fast
