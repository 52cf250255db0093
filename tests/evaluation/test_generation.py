"""Answers, whole and streamed."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lite.evaluation.generation import answer, stream


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


def test_an_error_in_the_generating_thread_reaches_the_caller(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream(model, tokenizer, [5, 6], [1], max_new_tokens=-1))
