"""Answers: one, a batch, and one streamed."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lite.evaluation.generation import answer, answers, stream
from qlora_lite.foundation.errors import CheckError
from tests.families import tiny_of
from tests.tiny import VOCABULARY, tiny_tokenizer

PROMPTS = (
    "What is seven times 3?",
    "Sea",
    "The weather report says that it will rain in the morning. Where is the train?",
    "How many apples are in the basket, if there were twelve?",
    "add(first, second)",
)


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llama)


def test_a_streamed_answer_is_the_whole_answer(loaded):
    model, tokenizer = loaded
    prompt = tokenizer("What is seven times 3?")["input_ids"]
    whole = answer(model, tokenizer, prompt, [1], max_new_tokens=12)
    pieces = list(stream(model, tokenizer, prompt, [1], max_new_tokens=12))
    assert "".join(pieces).strip() == whole != ""
    assert len(pieces) > 1


def test_an_answer_ends_at_an_end_token(loaded):
    model, tokenizer = loaded
    prompt = tokenizer("What is seven times 3?")["input_ids"]
    whole = answer(model, tokenizer, prompt, [1], max_new_tokens=12)
    every_token = list(range(len(tokenizer)))
    assert len(answer(model, tokenizer, prompt, every_token, max_new_tokens=12)) < len(whole)


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gpt2", "opt", "bloom"),  # rotary, learned, learned from the mask, ALiBi
        *("gemma3_text", "mistral", "qwen3"),  # sliding windows shorter than the prompts
        *("falcon_h1", "mamba2", "lfm2"),  # states and convolutions
    ],
)
def test_a_batch_of_prompts_of_different_lengths_is_answered_as_each_alone(family):
    changes = {"sliding_window": 8} if family in ("gemma3_text", "mistral") else {}
    model, tokenizer = tiny_of(family, **changes), tiny_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    alone = [by_argmax(model, tokenizer, prompt, [1], 12) for prompt in prompts]
    assert len(set(alone)) > 3
    assert answers(model, tokenizer, prompts, [1], 12) == alone
    assert answers(model, tokenizer, prompts, [1], 12, batch_rows=2) == alone


def by_argmax(model, tokenizer, prompt, end_ids, max_new_tokens):
    """The answer, from the whole text in each step, without a cache and without padding."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in end_ids:
                break
            ids.append(token)
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_every_row_of_a_batch_ends_at_its_own_end_token(loaded):
    model, tokenizer = loaded
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    ends = list(range(0, VOCABULARY, 7))
    alone = [by_argmax(model, tokenizer, prompt, ends, 24) for prompt in prompts]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in alone]
    assert len(set(lengths)) > 2
    assert answers(model, tokenizer, prompts, ends, 24) == alone


def test_no_prompts_have_no_answers(loaded):
    assert answers(*loaded, [], [1]) == []


def test_an_error_in_the_generating_thread_reaches_the_caller(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream(model, tokenizer, [5, 6], [1], max_new_tokens=-1))


def test_logits_that_are_not_finite_are_a_failed_check(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    prompt = tokenizer("Sea")["input_ids"]
    for temperature in (0.0, 0.7):
        with pytest.raises(CheckError, match="logits of the model are not finite"):
            list(stream(model, tokenizer, prompt, [1], temperature=temperature))
    with pytest.raises(CheckError, match="logits of the model are not finite"):
        answers(model, tokenizer, [prompt], [1])


def test_a_batch_is_padded_with_the_pad_token_even_if_its_id_is_0(loaded):
    model, tokenizer = loaded[0], copy.deepcopy(loaded[1])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    assert tokenizer.pad_token_id == 0
    seen = []
    keep = model.register_forward_pre_hook(
        lambda _, args, values: seen.append(values["input_ids"]), with_kwargs=True
    )
    answers(model, tokenizer, [[5, 6, 7], [5]], [1], max_new_tokens=1)
    keep.remove()
    assert seen[0].tolist() == [[5, 6, 7], [0, 0, 5]]
