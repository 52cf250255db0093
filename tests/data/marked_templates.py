"""Compare our masks with templates in which TRL has marked the answers.

TRL's training templates are those of the model families with {% generation %} around what is
trained. They are compared token by token, or character by character where a token merges across
the end of a prompt. `ALSO` lists what TRL trains although it is in the prompt.
"""

import copy
import re
from dataclasses import dataclass
from functools import cache
from itertools import groupby

import pytest

from qlora_lite.data.encoding import Encoded, encode
from qlora_lite.data.jinja_templates import FIXED_DATE
from qlora_lite.data.messages import Conversation
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.templates import ChatTemplate
from tests.data.real_tokenizers import original_template, real_tokenizer

THINKS, CLOSED, NO_THOUGHT = "<think>\n", "<think></think>", "<think>\n\n</think>\n\n"

ALSO = {
    "cohere": (),
    "cohere2": (),
    "gemma": (),
    "gemma3": (),
    "glm4moe": (),
    "gptoss": ("<|start|>assistant",),
    "idefics3": (),
    "lfm2": (),
    "lfm2_v2": (),
    "llama3": (),
    "llava_next": (),
    "muse_glimmer": ("<|start|>assistant",),
    "nemotron_3_nano": (CLOSED, THINKS),
    "nemotron_3_super": (CLOSED, THINKS),
    "nemotron_3_ultra": (CLOSED, THINKS),
    "nemotron_3_5_lightning": (CLOSED, THINKS),
    "phi3": ("<|im_end|>",),  # EOS here, which the template writes after <|end|>
    "phi3_5": ("<|im_end|>",),
    "qwen2_5": ("\n",),
    "qwen2_5_vl": (),
    "qwen3": (),
    "qwen3_5_nothink": (NO_THOUGHT, THINKS),
    "qwen3_5_think": (THINKS,),
    "qwen3_6": (THINKS,),
    "qwen3_8": (THINKS,),
    "qwen3_instruct_2507": (),
    "qwen3_vl": (),
    "smolvlm": (),
}
"""What TRL trains in addition, by the name of its template. The marked templates of DeepSeek train
<｜Assistant｜> and leave out <think>, so these rows are in `test_real_tokenizers.py`."""

UNMARKED = ("gemma4_v4", "gemma4_v5", "lfm2_2_5")
"""Other templates for the tokenizer with all special tokens: TRL has not marked these."""

OWN_TOKENIZERS = {"gemma": "gemma3", "gemma3": "gemma3", "gptoss": "gptoss", "llama3": "llama3"}
"""The others are tried with Qwen3's tokenizer and their special tokens."""
MERGES = ("qwen3_5_think", "qwen3_6", "qwen3_8")
"""Here the line break after <think> merges with the one after it. We split there."""


@dataclass(frozen=True)
class Pair:
    """A template of a model family, and how TRL has marked it."""

    template: ChatTemplate
    marked: str


@cache
def near_tokenizer():
    """Qwen3's tokenizer with the special tokens of all families."""
    tokenizer = copy.deepcopy(real_tokenizer("qwen3"))
    names = [name for name in (*ALSO, *UNMARKED) if name not in OWN_TOKENIZERS]
    sources = "".join(original_template(name) for name in names)
    markers = r"<\|[A-Za-z_/]+\|?>|<[a-z_]+\|>|<\|\"\|>"
    found = re.findall(rf"{markers}|\[gMASK\]|<sop>|<end_of_utterance>|</s>", sources)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(found))})
    return tokenizer


@cache
def pair(name: str) -> Pair:
    own = OWN_TOKENIZERS.get(name)
    tokenizer = copy.copy(real_tokenizer(own) if own else near_tokenizer())
    tokenizer.chat_template = original_template(name)
    marked = original_template(f"{name}_training")
    return Pair(ChatTemplate(tokenizer), FIXED_DATE + marked if "strftime" in marked else marked)


def encoded_by_us(name: str, row: Conversation) -> Encoded:
    template = pair(name).template
    return encode(template, [template.render(row)])[0]


def marked_by_trl(name: str, row: Conversation) -> Encoded:
    template = pair(name).template
    found = template.tokenizer.apply_chat_template(
        as_dicts(name, row),
        tools=list(row.tools) or None,
        chat_template=pair(name).marked,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    return Encoded(found["input_ids"], [bool(m) for m in found["assistant_masks"]])


def as_dicts(name: str, row: Conversation) -> list[dict]:
    """The messages as transformers documents them; as parts for templates of image models."""
    needs_parts = name in ("idefics3", "llava_next", "smolvlm")
    dicts = []
    for message in row.messages:
        content = message.content or ""
        found = {
            "role": message.role,
            "content": [{"type": "text", "text": content}] if needs_parts else content,
        }
        if message.reasoning:
            found["reasoning_content"] = message.reasoning
        if message.tool_calls:
            found["tool_calls"] = [
                {
                    "id": c.call_id,
                    "type": "function",
                    "function": {"name": c.name, "arguments": c.arguments},
                }
                for c in message.tool_calls
            ]
        if message.tool_call_id:
            found |= {"tool_call_id": message.tool_call_id, "name": message.name}
        dicts.append(found)
    return dicts


def require_the_mask_of_trl(name: str, row: Conversation) -> None:
    """Check that we train what TRL trains, less what is in the prompt, and what it cannot render
    is refused."""
    try:
        theirs = marked_by_trl(name, row)
    except Exception:  # of jinja, of the template itself, or of Python
        theirs = None
    tokenizer = pair(name).template.tokenizer
    text = "" if theirs is None else tokenizer.decode(theirs.ids)
    if theirs is None or not all(word in text for word in says(row)):
        with pytest.raises(RowError):
            encoded_by_us(name, row)
        return
    ours = encoded_by_us(name, row)
    if name not in MERGES:
        assert ours.ids == theirs.ids[: len(ours.ids)]
    our_text = tokenizer.decode(ours.ids)
    assert text.startswith(our_text)
    assert text[len(our_text) :].strip() in ("", *ALSO[name])
    our_parts, their_parts = (
        characters(tokenizer, encoded) if name in MERGES else tokens(tokenizer, encoded)
        for encoded in (ours, theirs)
    )
    extra = []
    for (part, here), (_, there) in zip(our_parts, their_parts, strict=False):
        assert there >= here, part
        extra.append((part, there > here))
    runs = groupby(extra, key=lambda pair: pair[1])
    found = {"".join(part for part, _ in run) for is_extra, run in runs if is_extra}
    assert found <= {"\n", *ALSO[name]}


def tokens(tokenizer, row: Encoded) -> list[tuple[str, bool]]:
    """The tokens of a row, and which of them are trained."""
    return [
        (tokenizer.decode([token]), is_trained)
        for token, is_trained in zip(row.ids, row.loss_mask, strict=True)
    ]


def characters(tokenizer, row: Encoded) -> list[tuple[str, bool]]:
    """The characters of a row, and which of them are trained."""
    found, text = [], ""
    for i, is_trained in enumerate(row.loss_mask):
        longer = tokenizer.decode(row.ids[: i + 1])
        if not longer.endswith("\N{REPLACEMENT CHARACTER}"):
            found += [(char, is_trained) for char in longer[len(text) :]]
            text = longer
    return found


def says(row: Conversation) -> list[str]:
    """What of a row is in its text, whatever the template."""
    calls = [call for message in row.messages for call in message.tool_calls]
    values = [value for call in calls for value in call.arguments.values()]
    return [
        *(message.reasoning for message in row.messages if message.reasoning),
        *(tool["function"]["name"] for tool in row.tools),
        *(call.name for call in calls),
        *(str(value) for value in values if type(value) in (str, int)),
    ]
