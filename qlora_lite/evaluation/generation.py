"""Generate the answer to a prompt, whole or streamed."""

from collections.abc import Iterator
from threading import Thread
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    end_ids: list[int],
    max_new_tokens: int = 64,
) -> str:
    """The most likely answer to a prompt, decoded, without special tokens."""
    ids = torch.tensor([prompt_ids], device=model.device)
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **_settings(tokenizer, end_ids, max_new_tokens, temperature=0.0),
        )
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    end_ids: list[int],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Yield the answer in pieces as they are generated."""
    ids = torch.tensor([prompt_ids], device=model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = _settings(tokenizer, end_ids, max_new_tokens, temperature)
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            with torch.no_grad():
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


def _settings(
    tokenizer: PreTrainedTokenizerBase, end_ids: list[int], max_new_tokens: int, temperature: float
) -> dict[str, Any]:
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    return {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": end_ids,
        "pad_token_id": tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else end_ids[0],
        "do_sample": False,
        **sampling,
    }
