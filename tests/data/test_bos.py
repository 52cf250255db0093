"""BOS and EOS: as the chat template writes them, and as the tokenizer adds them to plain text."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from qlora_lite.data.encoding import encode, encode_text
from qlora_lite.data.formats import Document
from qlora_lite.data.messages import Conversation, Message
from qlora_lite.data.settings import Data
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.tokenise import tokenise
from tests.tiny import BOS, EOS, tiny_tokenizer

ADDS = {"nothing": "$A", "bos": f"{BOS} $A", "bos and eos": f"{BOS} $A {EOS}", "eos": f"$A {EOS}"}
TURNS = (
    "{% for m in messages %}TURN{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}TURNassistant\n{% endif %}"
)
WRITES = {
    "no bos": TURNS.replace("TURN", "<|role|>"),
    "one": "{{ bos_token }}" + TURNS.replace("TURN", "<|role|>"),
    "one per turn": TURNS.replace("TURN", "{{ bos_token }}"),
    "two": "{{ bos_token }}{{ bos_token }}" + TURNS.replace("TURN", "<|role|>"),
    "no template": None,
}
texts = st.text(st.sampled_from("a the.\n 4é🍎"), min_size=1, max_size=30)
answers = texts.map(lambda text: f"so {text}")


@cache
def chat_template(adds: str, writes: str) -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=ADDS[adds], special_tokens=ids
    )
    tokenizer.chat_template = WRITES[writes]
    return ChatTemplate(tokenizer)


@given(
    st.sampled_from(sorted(ADDS)),
    st.sampled_from(sorted(WRITES)),
    st.none() | texts,
    st.lists(st.tuples(texts, answers), min_size=1, max_size=3),
)
def test_a_conversation_has_the_bos_and_eos_that_its_template_writes(adds, writes, system, turns):
    template = chat_template(adds, writes)
    messages = [("system", system)] if system else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    conversation = Conversation(tuple(Message(*message) for message in messages))
    (row,) = encode(template, [template.render(conversation)])

    expected = template.tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        chat_template=template.source,
        return_dict=False,
    )
    assert row.ids == expected[: len(row.ids)]
    num_bos = {
        "no bos": 0,
        "one": 1,
        "one per turn": len(messages),
        "two": 2,
        "no template": int(adds.startswith("bos")),  # the plain one, which is ours
    }
    assert row.ids.count(template.tokenizer.bos_token_id) == num_bos[writes]
    num_eos = len(turns) if writes == "no template" else len(messages)
    assert row.ids.count(template.tokenizer.eos_token_id) == num_eos


@given(st.sampled_from(sorted(ADDS)), st.sampled_from(sorted(WRITES)), texts, st.booleans())
def test_a_text_has_one_bos_if_the_tokenizer_adds_one(adds, writes, text, is_end):
    template = chat_template(adds, writes)
    (row,) = encode_text(template, [Document(text, is_end)])
    tokenizer = template.tokenizer
    added = tokenizer(text).input_ids
    expected = added[:-1] if adds.endswith("eos") else added
    assert row.ids == expected + [tokenizer.eos_token_id] * is_end
    assert row.ids.count(tokenizer.bos_token_id) == adds.startswith("bos")


@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("adds", ADDS)
def test_every_piece_of_a_long_text_has_one_bos_if_the_tokenizer_adds_one(write, adds, writes):
    template = chat_template(adds, writes)
    name = write("a.jsonl", '{"text": "' + "one two " * 100 + '"}\n')
    examples = tokenise(Data(train=name, max_tokens=50), name, template).examples
    assert len(examples) > 2
    for example in examples:
        count = example.ids.tolist().count(template.tokenizer.bos_token_id)
        assert count == adds.startswith("bos")


def test_an_unknown_word_that_is_the_bos_token_is_not_an_added_bos():
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "hello": 2}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
    (row,) = encode_text(ChatTemplate(tokenizer), [Document("hello")])
    assert row.ids == [2, 1]
