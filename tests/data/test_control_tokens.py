"""No text of a row becomes a control token."""

import json

import pytest
from tokenizers import AddedToken, normalizers

from qlora_lite.data.control_tokens import special_tokens
from qlora_lite.data.settings import Data
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.tokenise import tokenise
from qlora_lite.foundation.errors import DataError
from tests.tiny import BOS, EOS, PAD, ROLE, tiny_tokenizer

UNKNOWN, OTHER = "<unk>", "<|tool|>"


def tokenizer_with_all_kinds(template: str | None = None):
    """Bos, eos, unk and pad, markers of the template, others, and ordinary added tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"unk_token": UNKNOWN})
    tokenizer.add_tokens([OTHER], special_tokens=True)
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def read(write, row: dict | str, tokenizer=None, name: str = "a.jsonl", **settings):
    text = row if isinstance(row, str) else json.dumps(row) + "\n"
    path = write(name, text)
    template = ChatTemplate(tokenizer or tokenizer_with_all_kinds())
    return tokenise(Data(train=path, **settings), path, template)


ROWS = {
    "system": lambda t: {
        "messages": [{"role": "system", "content": t}, *chat("hi", "hello")["messages"]]
    },
    "user": lambda t: chat(t, "hello"),
    "assistant": lambda t: chat("hi", t),
    "instruction": lambda t: {"instruction": t, "output": "hello"},
    "input": lambda t: {"instruction": "hi", "input": t, "output": "hello"},
    "output": lambda t: {"instruction": "hi", "output": t},
    "prompt": lambda t: {"prompt": t, "completion": "hello"},
    "completion": lambda t: {"prompt": "hi", "completion": t},
    "text": lambda t: {"text": t},
}


def chat(question: str, answer: str) -> dict:
    roles = ("user", "assistant")
    texts = (question, answer)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}


TRAINED = {name: ROWS[name] for name in ("assistant", "output", "completion", "text")}
READ = {name: row for name, row in ROWS.items() if name not in TRAINED}


@pytest.mark.parametrize("row", READ.values(), ids=READ)
@pytest.mark.parametrize("token", [BOS, EOS, PAD, ROLE, UNKNOWN, OTHER])
def test_a_special_token_in_what_the_model_reads_is_plain_text(write, token, row):
    tokenizer = tokenizer_with_all_kinds()
    special = tokenizer.convert_tokens_to_ids(sorted(special_tokens(tokenizer)))
    plain, (example,) = (read(write, row(text)).examples for text in ("hi.evil", f"hi{token}evil"))
    counts = [[ids.count(token) for token in special] for ids in (plain.ids.tolist(),)]
    assert counts == [[example.ids.tolist().count(token) for token in special]]
    assert f"hi{token}evil" in tokenizer.decode(example.ids)
    assert tokenizer.decode(example.ids[example.loss_mask.bool()]) == f"hello{EOS}"


@pytest.mark.parametrize("row", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("token", [BOS, EOS, PAD, ROLE, UNKNOWN, OTHER])
def test_a_special_token_in_what_the_model_writes_is_refused(write, token, row):
    with pytest.raises(DataError) as caught:
        read(write, row(f"hi{token}evil"))
    assert "a.jsonl, line 1: " in str(caught.value)
    assert f"control token {token!r}, near " in str(caught.value)
    assert f"hi{token}evil'" in str(caught.value)


FULL_WIDTH = "＜|evil|＞"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_special_token_that_normalisation_makes_is_refused(write, row):
    tokenizer = tokenizer_with_all_kinds()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<|evil|>", special=True, normalized=True)])
    assert len(tokenizer(FULL_WIDTH, add_special_tokens=False).input_ids) == 1
    with pytest.raises(DataError) as caught:
        read(write, row(f"a{FULL_WIDTH}b"), tokenizer)
    assert "control token '<|evil|>', near '" in str(caught.value)
    assert f"a{FULL_WIDTH}b'" in str(caught.value)
    assert read(write, row("a ＜b＞ é ☃"), tokenizer).examples


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_special_tokens_of_a_row_are_those_of_its_template(write, row):
    tokenizer = tokenizer_with_all_kinds()
    special = {tokenizer.convert_tokens_to_ids(token) for token in special_tokens(tokenizer)}
    found = [
        [token for token in read(write, row(text)).examples.ids.tolist() if token in special]
        for text in ("hello", "<think> <|nothing|> [INST] < | end | >")
    ]
    assert found[0] == found[1]


def test_one_special_token_at_the_end_of_a_document_is_no_exception(write):
    with pytest.raises(DataError, match=r"a document gets its end token by itself"):
        read(write, {"text": f"hello{EOS}"})


def test_the_line_of_a_token_in_a_text_file_is_named(write):
    with pytest.raises(DataError, match=r"a\.txt, line 5: the text contains .*'<\|end\|>'"):
        read(write, f"one\n\ntwo\n\nthree{EOS}\nfour\n", name="a.txt")


def test_the_filled_prompt_and_the_system_message_are_checked(write):
    row = {"a": "<|", "b": "end|>", "completion": "hello"}
    eos = tokenizer_with_all_kinds().eos_token_id
    prompt = read(write, row, prompt="{a}{b}").examples.ids.tolist()
    system = read(write, chat("hi", "hello"), system=f"Be brief.{EOS}").examples.ids.tolist()
    assert (prompt.count(eos), system.count(eos)) == (2, 3)  # one for each turn


BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>>"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
BARS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "marker"),
    [
        (BRACKETS, "[INST]"),
        (BRACKETS, "[/INST]"),
        (BRACKETS, "<<SYS>>"),
        (BRACKETS, "<</SYS>>"),
        (BARS, "<|user|>"),
        (BARS, "<|assistant|>"),
        (BARS, "<|system|>"),
    ],
)
def test_a_marker_of_the_template_that_is_ordinary_text_is_refused(write, template, marker):
    tokenizer = tokenizer_with_all_kinds(template)
    assert len(read(write, chat("hi", "hello"), tokenizer).examples) == 1
    with pytest.raises(DataError) as caught:
        read(write, chat(f"hi{marker}evil", "hello"), tokenizer)
    assert f"control token {marker!r}" in str(caught.value)


def test_an_ordinary_word_or_mark_that_pads_is_text(write):
    for word in ("!", "pad"):
        tokenizer = tokenizer_with_all_kinds()
        tokenizer.pad_token = word
        assert len(read(write, chat("pad!", "hello!"), tokenizer).examples) == 1


def test_special_tokens_in_calls_tools_and_names_are_refused(write):
    template = tokenizer_with_all_kinds().chat_template
    call = {"function": {"name": "f", "arguments": {"a": f"b{EOS}"}}}
    tool = {"function": {"name": "f", "description": f"b{EOS}"}}
    asked, answered = chat("hi", "hello")["messages"]
    rows = {
        r"message 1 \(assistant\)": {"messages": [asked, answered | {"tool_calls": [call]}]},
        "the tools": {"messages": [asked, answered], "tools": [tool]},
        r"message 0 \(user\)": {"messages": [asked | {"name": f"b{EOS}"}, answered]},
    }
    for where, row in rows.items():
        with pytest.raises(DataError, match=rf"{where} contains the control token '<\|end\|>'"):
            read(write, row, tokenizer_with_all_kinds(template))


@pytest.mark.parametrize("row", READ.values(), ids=READ)
def test_the_characters_that_hide_tokens_are_refused(write, row):
    with pytest.raises(DataError, match=r"contains the character U\+F1000"):
        read(write, row("hi \U000f1000"))
