"""A merged directory: complete or absent, with config, tokenizer and licences."""

import json
import multiprocessing

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.export.directory import resumable_directory, save_tokenizer, write_companions
from qlora_lite.foundation.errors import ExportError, RunError
from tests.tiny import tiny_tokenizer


@pytest.fixture
def base(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "torch_dtype": "float16",
                "quantization_config": {"load_in_4bit": True},
                "_name_or_path": "/some/path",
                "rope_theta": 1e6,
                "bos_token_id": 0,
                "eos_token_id": 5,
            }
        )
    )
    for name in ("LICENSE", "NOTICE.txt", "Use_Policy.md", "code.py", "notes.txt"):
        (base / name).write_text(name)
    return base


def companions(base, out, **changes):
    out.mkdir()
    settings = {
        "dtype": torch.bfloat16,
        "is_tied": None,
        "end_ids": [1],
        "with_code": False,
    }
    write_companions(out, base, tiny_tokenizer(), **(settings | changes))
    return {path.name: path.read_text() for path in out.iterdir()}


def test_the_config_is_that_of_the_base_except_for_what_changed(base, tmp_path):
    found = companions(base, tmp_path / "out")
    assert json.loads(found["config.json"]) == {
        "model_type": "llama",
        "rope_theta": 1e6,
        "bos_token_id": 0,
        "eos_token_id": 5,
        "dtype": "bfloat16",
    }


def test_a_head_that_is_no_longer_tied_is_recorded(base, tmp_path):
    found = companions(base, tmp_path / "out", is_tied=False)
    assert json.loads(found["config.json"])["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, {"bos_token_id": 0, "eos_token_id": [1, 5]}),
        ({"eos_token_id": 1, "top_p": 0.9}, {"eos_token_id": 1, "top_p": 0.9}),
        ({"eos_token_id": [7, 1]}, {"eos_token_id": [1, 7]}),
        ({"temperature": 0.6}, {"temperature": 0.6, "eos_token_id": 1}),
    ],
)
def test_generation_stops_at_the_end_of_turn_and_where_the_base_stops(
    base, tmp_path, before, after
):
    if before is not None:
        (base / "generation_config.json").write_text(json.dumps(before))
    found = companions(base, tmp_path / "out")
    assert json.loads(found["generation_config.json"]) == after


def test_licences_are_copied_and_code_only_on_request(base, tmp_path):
    found = companions(base, tmp_path / "out")
    assert {"LICENSE", "NOTICE.txt", "Use_Policy.md"} <= found.keys()
    assert not {"code.py", "notes.txt"} & found.keys()
    assert "code.py" in companions(base, tmp_path / "with_code", with_code=True)


def test_a_directory_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), resumable_directory(out, "a") as temporary:
        (temporary / "part").write_text("1")
        raise ZeroDivisionError
    assert not out.exists()
    with resumable_directory(out, "a") as temporary:
        assert (temporary / "part").read_text() == "1"
    assert [path.name for path in out.iterdir()] == ["part"]


def test_a_directory_may_contain_directories(tmp_path):
    """As a tokenizer with several chat templates is saved."""
    with resumable_directory(tmp_path / "out", "a") as temporary:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
        tokenizer.save_pretrained(temporary)
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").is_file()
    assert not list((tmp_path / "out").glob(".*"))


def test_files_of_another_merge_are_deleted(tmp_path):
    with pytest.raises(ZeroDivisionError), resumable_directory(tmp_path / "out", "a") as temporary:
        (temporary / "part").mkdir()
        raise ZeroDivisionError
    with resumable_directory(tmp_path / "out", "b") as temporary:
        assert not (temporary / "part").exists()


def try_to_write(out, answers):
    try:
        with resumable_directory(out, "a"):
            answers.put("entered")
    except RunError as error:
        answers.put(str(error))


def test_two_processes_cannot_write_the_same_directory(tmp_path):
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    with resumable_directory(tmp_path / "out", "a"):
        child = context.Process(target=try_to_write, args=(tmp_path / "out", answers))
        child.start()
        assert "in use by process" in answers.get(timeout=60)
        child.join()


def test_a_file_created_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="exists already"), resumable_directory(out, "a"):
        out.write_text("somebody else's")
    assert out.read_text() == "somebody else's"


def test_a_broken_link_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "nothing")
    with pytest.raises(ExportError, match="exists already"), resumable_directory(out, "a"):
        pytest.fail("entered")
    assert out.is_symlink()


def test_nothing_is_put_in_place_if_the_lock_was_taken_away(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(RunError, match="moved or deleted while this process was using it"),
        resumable_directory(out, "a") as temporary,
    ):
        (temporary / ".lock").unlink()
    assert not out.exists()


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_tokenizer_without_a_template_is_saved_with_the_one_of_training(tmp_path, adds_bos):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    if not adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    messages = [
        {"role": "user", "content": "what is one plus two?"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "and two plus two?"},
    ]
    template = ChatTemplate(tokenizer)
    assert template.adds_bos == adds_bos
    expected = template.prompt([Message(m["role"], m["content"]) for m in messages])
    save_tokenizer(tokenizer, tmp_path)
    assert tokenizer.chat_template is None
    saved = AutoTokenizer.from_pretrained(tmp_path)
    prompt = saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == expected
    assert "generation %" not in saved.chat_template
    again = ChatTemplate(saved)
    assert again.end_of_turn == template.end_of_turn
    conversation = Conversation(tuple(Message(m["role"], m["content"]) for m in messages[:2]))
    assert again.render(conversation) == template.render(conversation)
