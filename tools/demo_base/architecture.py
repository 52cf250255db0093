"""The settings of the base model, and the model with random weights."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 512
"""Tokens per row in pretraining; the model accepts twice as many."""


@dataclass(frozen=True)
class Pretraining:
    """The settings of pretraining, chosen by one-minute runs on two cores.

    Held-out nats per byte after about 500,000 tokens each:

        hidden 192, 4 layers, vocabulary 2048, own head,  batch 8   1.78
        hidden 192, 5 layers, vocabulary 3072, tied head, batch 8   1.74
        hidden 192, 3 layers, vocabulary 3072, tied head, batch 4   1.64 (410,000 tokens)
        hidden 128, 4 layers, vocabulary 2048, own head,  batch 4   1.61
        hidden 128, 4 layers, vocabulary 3072, tied head, batch 4   1.57

    In a given time on a CPU, a smaller model with more and smaller steps learns more.
    """

    vocabulary: int = 3072
    hidden: int = 128
    mlp: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    tie: bool = True

    batch: int = 4
    lr: float = 4e-3
    lr_floor: float = 0.05
    warmup: float = 0.03
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0


def new_model(settings: Pretraining, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random weights; widths of all linear layers are multiples of 64."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=CONTEXT * 2,
        tie_word_embeddings=settings.tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(config)
