"""The model card: the base, how it was made, and the measurements."""

import math
import platform
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from demo_base.architecture import CONTEXT
from demo_base.corpus import Corpus
from demo_base.pretraining import Result
from demo_base.tokenizer import encode

CARD = """\
---
license: other
license_name: python-software-foundation-licence
license_link: LICENSE-PSF
language: en
pipeline_tag: text-generation
---

# The embedded model of qlora_lite

A Llama of {parameters:,} parameters, trained only on the documentation inside Python {python}.
Its purpose is to show and test fine-tuning on any machine without a download.  It imitates the
style of Python's docstrings; do not rely on its facts.

| | |
|---|---|
| architecture | Llama: {layers} layers, hidden {hidden}, MLP {mlp}, {heads} query heads on {kv_heads} key-value heads, RoPE, RMSNorm, {head} head |
| weights | bf16, {megabytes:.2f} MB |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, digits one by one; any text comes back byte for byte |
| context | trained on {context} tokens; `max_position_embeddings` is {positions}, positions in the second half were not trained |
| chat | `<|user|>` and `<|assistant|>`, a turn of the assistant ends in `<|eos|>`; not seen in pretraining |

## How it was made

`{command}`

| | |
|---|---|
| text | {documents:,} documents, {characters:,} characters, {unique_tokens:,} tokens |
| held out | {held_out:,} objects, their docstrings in no document |
| pretraining | {steps:,} steps of {batch} x {context} tokens: {tokens:,} tokens, {epochs:.1f} epochs |
| optimizer | AdamW in fp32, peak learning rate {lr:g}, cosine to {lr_floor:.0%}, warm-up {warmup:.0%}, weight decay {weight_decay:g} |
| time | {seconds:,.0f} seconds of pretraining on {threads} CPU thread(s) |
| final train loss | {train_loss:.4f} nats per token (perplexity {train_perplexity:.1f}), mean of the last tenth of the steps |
| final held-out loss | {held_out_loss:.4f} nats per token (perplexity {held_out_perplexity:.1f}), {held_out_bits:.3f} bits per byte; a uniform guess has {uniform:.2f} nats |
| made with | Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers} |

The held-out loss is that of the documents of the held-out objects, each read alone, with the bf16
values of the file computed in fp32.

## The rows

`../data/train.jsonl` has {train_rows:,} conversations, `../data/heldout.jsonl` has {held_out_rows:,}:
a question about an object of the standard library, and the first sentence of its docstring.  No
answer of the second file occurs in the pretraining text or in the first file.

## Licence

The text is Python's: see `NOTICE` and `LICENSE-PSF`.
"""  # noqa: E501


def card(
    base: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, result: Result, threads: int
) -> str:
    """The text of the model card."""
    settings = result.settings
    held_out_tokens = sum(
        len(d[:CONTEXT]) - 1 for d in encode(corpus.held_out_documents, tokenizer)
    )
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out_documents)
    unique_tokens = sum(map(len, encode(corpus.documents, tokenizer)))
    return CARD.format(
        **asdict(settings),
        parameters=result.parameters,
        head="tied" if settings.tie else "own",
        megabytes=(base / "model.safetensors").stat().st_size / 1e6,
        context=CONTEXT,
        positions=CONTEXT * 2,
        command=f"python tools/build_demo_base.py --steps {result.steps} --threads {threads}",
        documents=len(corpus.documents),
        characters=sum(map(len, corpus.documents)),
        unique_tokens=unique_tokens,
        held_out=len(corpus.held_out_documents),
        steps=result.steps,
        tokens=result.tokens,
        epochs=result.tokens / unique_tokens,
        seconds=result.seconds,
        threads=threads,
        train_loss=result.train_loss,
        train_perplexity=math.exp(result.train_loss),
        held_out_loss=result.held_out_loss,
        held_out_perplexity=math.exp(result.held_out_loss),
        held_out_bits=result.held_out_loss * held_out_tokens / held_out_bytes / math.log(2),
        uniform=math.log(settings.vocabulary),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
        train_rows=len(corpus.rows),
        held_out_rows=len(corpus.held_out_rows),
    )
