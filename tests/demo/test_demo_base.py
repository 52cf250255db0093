"""The embedded model and its rows, and `tools/build_demo_base.py`, which makes them."""

import importlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "qlora_lite" / "demo" / "base"
DATA = ROOT / "qlora_lite" / "demo" / "data"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    """The package of the script; its folder is on `sys.path` when the script runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        importlib.import_module("build_demo_base")
        yield importlib.import_module("demo_base")


def rows(name: str) -> list[list[dict[str, str]]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def plain(text: str) -> str:
    return " ".join(text.split()).lower().rstrip(".")


# ----------------------------------------------------------------------------------- the tokenizer


@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["  two  spaces \n\n\tand tabs\r\n", "naïve 日本語 🙂 é", "12345.678", "a , b . c 's"]
)
def test_awkward_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_every_digit_is_a_token(tokenizer):
    ids = tokenizer("2048", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["2", "0", "4", "8"]


def test_special_tokens_are_distinct_and_known_to_both_configurations(tokenizer):
    config = json.loads((BASE / "config.json").read_text())
    generation = json.loads((BASE / "generation_config.json").read_text())
    ids = {"pad": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id}
    ids["eos"] = tokenizer.eos_token_id
    for name, token_id in ids.items():
        assert config[f"{name}_token_id"] == generation[f"{name}_token_id"] == token_id
    roles = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert len({*ids.values(), *roles}) == 5
    assert len(tokenizer) == config["vocab_size"]
    assert len(tokenizer) % 64 == 0


# -------------------------------------------------------------------------------- the chat template

TWO_TURNS = [
    {"role": "user", "content": "What does len do?"},
    {"role": "assistant", "content": "It counts."},
    {"role": "user", "content": "  And now?\n"},
    {"role": "assistant", "content": " So on. "},
]


def test_the_template_renders_a_conversation(tokenizer):
    assert tokenizer.apply_chat_template(TWO_TURNS, tokenize=False) == (
        "<|bos|><|user|>\nWhat does len do?\n<|assistant|>\nIt counts.<|eos|>\n"
        "<|user|>\nAnd now?\n<|assistant|>\nSo on.<|eos|>\n"
    )


def test_a_system_message_comes_first(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *TWO_TURNS[:1]]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|>Be brief.\n<|user|>\nWhat does len do?\n<|assistant|>\n"


def test_an_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("messages", [TWO_TURNS, *rows("heldout.jsonl")[:20]])
def test_only_the_answers_and_their_end_tokens_are_trained(tokenizer, messages):
    rendered = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    trained = [
        i
        for i, is_trained in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True)
        if is_trained
    ]
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    assert tokenizer.decode(trained) == "".join(f"{answer}<|eos|>" for answer in answers)


def test_the_generation_prompt_is_a_prefix_of_the_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template(
        TWO_TURNS[:1], add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(TWO_TURNS[:2], return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert whole.count(tokenizer.bos_token_id) == 1


# ---------------------------------------------------------------------------------------- the model


def test_the_model_is_small(model):
    assert 1_000_000 <= model.num_parameters() <= 2_500_000
    assert (BASE / "model.safetensors").stat().st_size <= 5_000_000


def test_weights_are_bf16_and_tied(model):
    with safe_open(BASE / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert model.config.tie_word_embeddings
    assert "lm_head.weight" not in names
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_heads_share_keys_and_values(model):
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (config.num_attention_heads * 32, config.hidden_size)
    assert attention.k_proj.weight.shape == (config.num_key_value_heads * 32, config.hidden_size)


def test_every_linear_layer_divides_into_blocks_of_64(model):
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert layer.in_features % 64 == layer.out_features % 64 == 0, name


def test_embeddings_of_user_and_assistant_differ(model, tokenizer):
    vectors = model.model.embed_tokens.weight[
        tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    ]
    assert torch.cosine_similarity(*vectors, dim=0) < 0.9


@torch.no_grad()
def mean_loss(model, texts_ids: list[list[int]]) -> float:
    """Cross-entropy from the logits, by hand: nats per token, each text alone."""
    total, count = 0.0, 0
    for ids in texts_ids:
        log_p = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        total -= log_p.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
        count += len(ids) - 1
    return total / count


def test_the_model_predicts_docstrings_better_than_chance(model, tokenizer):
    """Plain documents made of the held-out rows, in the form of the pretraining text."""
    held_out = [
        tokenizer(f"function {question['content'].split()[-2]}()\n{answer['content']}")["input_ids"]
        for question, answer in rows("heldout.jsonl")
        if question["content"].endswith(" do?")
    ]
    assert len(held_out) >= 20
    assert mean_loss(model, held_out) < math.log(len(tokenizer)) - 3


def test_word_order_matters_to_the_model(model, tokenizer):
    """A unigram model would give both the same loss."""
    answers = [tokenizer(answer["content"])["input_ids"] for _, answer in rows("heldout.jsonl")]
    reversed_answers = [[bos, *reversed(rest)] for bos, *rest in answers]
    assert mean_loss(model, answers) < mean_loss(model, reversed_answers) - 1


def test_the_card_agrees_with_the_files(model, tokenizer):
    card = (BASE / "README.md").read_text(encoding="utf-8")
    assert f"{model.num_parameters():,} parameters" in card
    assert f"{len(tokenizer):,} tokens" in card
    assert f"`../data/train.jsonl` has {len(rows('train.jsonl')):,} conversations" in card
    assert f"`../data/heldout.jsonl` has {len(rows('heldout.jsonl')):,}" in card
    assert re.search(r"final held-out loss \| \d\.\d{4} nats per token", card)
    assert re.search(r"[\d,]+ seconds of pretraining on \d+ CPU thread", card)


def test_the_licence_of_the_text_comes_with_it():
    assert "Python Software Foundation" in (BASE / "NOTICE").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (BASE / "LICENSE-PSF").read_text("utf-8")


# ----------------------------------------------------------------------------------------- the rows


def test_there_are_thousands_of_rows_and_about_200_held_out():
    assert len(rows("train.jsonl")) >= 3000
    assert 150 <= len(rows("heldout.jsonl")) <= 300


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_every_row_is_one_question_and_one_answer(name):
    for messages in rows(name):
        assert [m["role"] for m in messages] == ["user", "assistant"]
        question, answer = (m["content"] for m in messages)
        assert question.endswith(("?", "."))
        assert answer.endswith(".")
        assert 20 < len(answer) < 200


def test_questions_and_answers_are_unique():
    everything = rows("train.jsonl") + rows("heldout.jsonl")
    assert len({question["content"] for question, _ in everything}) == len(everything)
    assert len({plain(answer["content"]) for _, answer in everything}) == len(everything)


def test_no_held_out_answer_occurs_in_a_training_row():
    training = "\n".join(plain(answer["content"]) for _, answer in rows("train.jsonl"))
    for _, answer in rows("heldout.jsonl"):
        assert plain(answer["content"]) not in training


# --------------------------------------------------------------------------------------- the script


@pytest.mark.parametrize(
    ("doc", "answer"),
    [
        (
            "S.join(it) -> str\n\nGlue strings e.g. of a list.  More.",
            "Glue strings e.g. of a list.",
        ),
        ("join two path names,\ninserting a slash", "Join two path names, inserting a slash."),
        ("mailbox -- Read and write mail boxes.", "Read and write mail boxes."),
        ("", None),
        ("Foo(bar, baz)", None),
        ("Alias for field number 3 of it", None),
        (">>> 1 + 1 == 2 and 2 + 2 == 4", None),
        ("See below for this one:\n\n  x", None),
    ],
)
def test_an_answer_is_the_first_sentence_if_it_is_usable(build, doc, answer):
    assert build.questions.first_sentence(doc) == answer


def test_the_best_known_name_is_chosen(build):
    names = ["posixpath.join", "os.path.join", "_private.join", "genericpath.join"]
    assert min(names, key=build.docstrings.name_order) == "os.path.join"


def test_signatures_do_not_depend_on_the_machine(build):
    secret = {"HOME": "secret"}
    source = "def f(self, a, b=1, c=None, env=secret, path='/secret', *rest, d='x'): pass"
    names: dict = {"secret": secret}
    exec(source, names)
    shown = build.docstrings.signature(names["f"])
    assert shown == "(a, b=1, c=None, env=..., path=..., *rest, d='x')"


def test_packed_batches_hold_every_document_once_an_epoch(build):
    documents = [[i] * (i + 1) for i in range(300)]
    length = 4 * build.architecture.CONTEXT
    batches = build.pretraining.packed_batches(documents, batch=4, seed=0)
    epoch_tokens = sum(map(len, documents))
    stream = torch.cat([next(batches).flatten() for _ in range(-(-epoch_tokens // length))])
    counts = stream[:epoch_tokens].bincount(minlength=300)
    assert counts.tolist() == [len(document) for document in documents]


def test_the_learning_rate_rises_then_falls_to_its_floor(build):
    settings = build.architecture.Pretraining(lr=1.0, lr_floor=0.1, warmup=0.1)
    rates = [build.pretraining.cosine(step, 100, settings) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


@pytest.fixture(scope="module")
def corpus(build):
    return build.corpus.collect()


@pytest.mark.slow
def test_nothing_held_out_is_in_the_pretraining_text(build, corpus):
    seen = "\n".join(map(build.docstrings.plain, corpus.documents))
    for messages in corpus.held_out_rows:
        assert plain(messages["messages"][1]["content"]) not in seen


@pytest.mark.slow
def test_the_text_does_not_depend_on_the_machine(build, corpus):
    """No path, address or environment of the machine that collects it."""
    for text in corpus.documents:
        for private in (str(Path.home()), sys.prefix, sys.base_prefix, " at 0x7f"):
            assert private not in text, text[:80]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(build, corpus):
    documents = corpus.documents[:2000]
    weights = []
    for _ in range(2):
        tokenizer = build.tokenizer.train_tokenizer(documents, 3072)
        model = build.architecture.new_model(build.architecture.Pretraining(), tokenizer)
        seen = build.tokenizer.encode(documents, tokenizer)
        build.pretraining.pretrain(model, seen, seen[:5], 3, build.architecture.Pretraining())
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
