"""Rows as conversations or documents, and the place of a row that is neither."""

import json

import pytest

from qlora_lite.data.formats import Document
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.read_rows import read_rows
from qlora_lite.data.settings import Data
from qlora_lite.data.sources import open_source
from qlora_lite.foundation.errors import DataError

LINE = json.dumps({"prompt": "2 + 2?", "completion": "4"})


def read(name: str, **settings):
    return list(read_rows(open_source(name), Data(train=name, **settings)))


def test_rows_have_the_format_of_the_first_one(write):
    name = write("a.jsonl", LINE + '\n{"prompt": "a", "completion": "b", "text": "c"}\n')
    assert [item for _, item in read(name, system="Be brief.")][1] == Conversation(
        (Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"))
    )
    assert read(name, format="completion") == read(name)


def test_a_text_file_is_documents(write):
    assert read(write("a.txt", "one\n")) == [(1, Document("one", is_end=True))]


WRONG = {
    "huge number": ("a.jsonl", '{"prompt": "a", "completion": 1e999}', "'completion': got inf"),
    "surrogate": (
        "a.jsonl",
        LINE + '\n{"prompt": "a", "completion": "b\\ud800"}',
        r"line 2: field 'completion': character 1 is '\\ud800', half of a surrogate pair",
    ),
    "surrogate in a message": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "\\udc00"}]}',
        r"line 1: field 'messages\[0\].content': character 0",
    ),
    "missing field": (
        "a.jsonl",
        LINE + '\n\n{"prompt": "a", "answer": "b"}\n',
        r"line 3: field 'completion': is missing.*'prompt', 'answer'",
    ),
    "null": ("a.jsonl", LINE + '\n{"prompt": "a", "completion": null}\n', "line 2: .*'completion'"),
    "not text": (
        "a.jsonl",
        '{"prompt": "a", "completion": ["b"]}\n',
        "line 1: field 'completion': got a list, text is needed",
    ),
    "empty answer": (
        "a.csv",
        "prompt,completion\na,b\nc,\n",
        "line 3: .*assistant message is empty",
    ),
    "unknown fields": ("a.jsonl", '{"q": "a", "a": "b"}\n', r"line 1: .*'q', 'a'.*data\.fields"),
    "empty document": ("a.jsonl", '{"text": " "}\n', "line 1: field 'text': is empty"),
}


@pytest.mark.parametrize(("name", "content", "message"), WRONG.values(), ids=WRONG)
def test_a_row_that_does_not_fit_the_format_is_named_with_its_place(write, name, content, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(write(name, content))


CONVERSATIONS = {
    "not a list": ("hello", "field 'messages': got a str"),
    "no messages": ([], "has no messages"),
    "not an object": (["a"], r"field 'messages\[0\]': got a str"),
    "bad role": ([{"role": "bot", "content": "a"}], r"'messages\[0\].role': got 'bot'"),
    "no role": ([{"content": "a"}], r"'messages\[0\].role': got None"),
    "no content": ([{"role": "user"}], r"'messages\[0\].content': got null"),
    "number": ([{"role": "user", "content": 3}], r"'messages\[0\].content': got a int"),
    "no answer": ([{"role": "user", "content": "a"}], "ends with the user"),
    "empty answer": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}],
        "message 1: the assistant message is empty",
    ),
    "calls of a user": (
        [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}],
        "is in a message of the user",
    ),
    "an image": (
        [{"role": "user", "content": [{"type": "image", "url": "river.png"}]}],
        r"content\[0\]'.*only text is supported",
    ),
    "half a weight": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}],
        r"'messages\[1\].weight': got 0.5, 0 or 1 is needed",
    ),
    "flags that disagree": (
        [{"role": "assistant", "content": "b", "weight": 1, "train": False}],
        "train, weight disagree",
    ),
    "nothing trained": (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}],
        "no turn of the assistant is trained",
    ),
}


@pytest.mark.parametrize(("messages", "message"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_row_that_is_not_a_conversation_is_refused(write, messages, message):
    name = write("a.jsonl", "\n" + json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=f"a.jsonl, line 2: .*{message}"):
        read(name)


def test_a_header_that_is_missing_is_noticed_at_the_first_row(write):
    name = write("a.tsv", "good film\t1\nbad film\t0\n")
    with pytest.raises(DataError, match=r"line 2: .*'good film', '1'.*data\.columns"):
        read(name)


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PREFERENCES = {
    "pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "completion"),
    "conversations": ({"chosen": CHAT, "rejected": CHAT}, "messages"),
    "texts": ({"chosen": "a", "rejected": "b"}, "text"),
    "instructions": ({"instruction": "a", "chosen": "b", "rejected": "c"}, "text"),
}


@pytest.mark.parametrize(("row", "field"), PREFERENCES.values(), ids=PREFERENCES)
def test_preference_rows_are_recognised_and_may_be_mapped(write, row, field):
    name = write("a.jsonl", json.dumps(row))
    with pytest.raises(DataError) as caught:
        read(name)
    assert "line 1: this is a preference row (chosen and rejected)" in str(caught.value)
    assert f'data.fields=\'{{"{field}": "chosen"}}\'' in str(caught.value)
    assert len(read(name, fields={field: "chosen"})) == 1


def test_a_prompt_with_another_format_is_refused(write):
    with pytest.raises(DataError, match=r"data\.prompt needs the format completion"):
        read(write("a.jsonl", '{"text": "a"}'), prompt="{text}", format="text")


def test_a_field_that_no_row_has_is_named(write):
    name = write("a.jsonl", LINE)
    with pytest.raises(
        DataError, match=r"line 1: there is no field 'compl', .* mean 'completion'.* has 'prompt'"
    ):
        read(name, fields={"completion": "compl"})
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d", "ctx": "e"}]
    name = write("b.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"input is the field 'context', but no row of .* has it"):
        read(name, fields={"input": "context"})
    assert len(read(name, fields={"input": "ctx"})) == 2
