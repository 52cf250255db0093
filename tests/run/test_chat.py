"""Conversations with a model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lite.data.formats import Message
from qlora_lite.foundation.errors import DataError
from qlora_lite.run.chat import ChatSession, fit_turns, load, load_for_chat
from tests.tiny import save_tiny


def turns(*contents):
    roles = ("user", "assistant")
    return tuple(Message(roles[i % 2], text) for i, text in enumerate(contents))


def letters(kept):
    return sum(len(turn.content) for turn in kept)


def test_turns_that_fit_are_all_kept():
    said = turns("abc", "de", "f")
    assert fit_turns(said, letters, 6) == said
    assert fit_turns(said, letters, None) == said


def test_the_oldest_question_goes_with_its_answer():
    said = turns("abc", "de", "f", "gh", "i")
    assert fit_turns(said, letters, 8) == said[2:]
    assert fit_turns(said, letters, 3) == said[4:]


def test_a_question_that_never_fits_is_refused():
    with pytest.raises(DataError, match="3 tokens"):
        fit_turns(turns("abc"), letters, 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("speaking") / "llama", "llama")


def test_an_answer_is_what_transformers_generates(llama):
    talk = ChatSession(load_for_chat(llama, "cpu"), max_new_tokens=12)
    said = "".join(talk.ask("What is the capital of France?"))
    tokenizer = talk.tokenizer
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    output = model.generate(**ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == expected


def test_the_conversation_is_remembered_until_it_is_reset(llama):
    talk = ChatSession(load_for_chat(llama, "cpu"), max_new_tokens=4, system="Be brief.")
    first = "".join(talk.ask("one")).strip()
    list(talk.ask("two"))
    assert [turn.content for turn in talk.turns[:3]] == ["one", first, "two"]
    talk.reset()
    assert "".join(talk.ask("one")).strip() == first


def test_a_full_context_drops_the_oldest_turns_and_counts_them(tmp_path):
    small = save_tiny(tmp_path / "small", "llama", max_position_embeddings=96)
    talk = ChatSession(load_for_chat(small, "cpu"), max_new_tokens=8)
    dropped = []
    for _ in range(6):
        list(talk.ask("How many apples are in the basket, if there were twelve?"))
        dropped.append(talk.num_dropped)
    assert dropped[0] == 0
    assert any(dropped)


def test_a_base_without_a_chat_template_speaks_too(tmp_path):
    base = save_tiny(tmp_path / "gpt2", "gpt2", tied=True)
    (base / "chat_template.jinja").unlink()
    model, tokenizer = load(base)
    assert tokenizer.chat_template is None
    assert isinstance(model, torch.nn.Module)
    talk = ChatSession(load_for_chat(base, "cpu"), max_new_tokens=4)
    assert isinstance("".join(talk.ask("hello")), str)
