"""Our masks are those of templates in which TRL has marked the answers, where these are right.

TRL's training templates are those of the model families with {% generation %} around what is
trained. They are compared character by character, and token by token where no token merges across
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
from qlora_lite.data.messages import Conversation, Message, ToolCall
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

OWN_TOKENIZERS = {"gemma": "gemma3", "gemma3": "gemma3", "gptoss": "gptoss", "llama3": "llama3"}
"""The others are tried with Qwen3's tokenizer and their special tokens."""
BIG = ("gemma", "gemma3", "gptoss")
MERGES = ("qwen3_5_think", "qwen3_6", "qwen3_8")
"""Here the line break after <think> merges with the one after it. We split there."""
ORDINARY = ("cohere2", "glm4moe", "nemotron_3_nano", "qwen2_5", "qwen3", "qwen3_5_think")

CALL = ToolCall("river_length", {"river": "Elbe", "unit": "km", "digits": 3}, "call00001")
TOOL = {
    "type": ("function",),
    "function": {
        "name": "river_length",
        "description": "Length of a river",
        "parameters": {
            "type": "object",
            "properties": {"river": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["river"],
        },
    },
}
ASK, CALLS = (
    Message("user", "How long is the Elbe?"),
    Message("assistant", None, tool_calls=(CALL,)),
)
RESULT = Message("tool", "1094", tool_call_id="call00001", name="river_length")
SAID = Message("assistant", "1094 km — zwölf mehr als der Rhein.\n\nReally 🍎.")
ROWS = {
    "one question": Conversation((ASK, SAID)),
    "three questions": Conversation((ASK, SAID, ASK, Message("assistant", "- 1094"), ASK, SAID)),
    "system": Conversation((Message("system", "Be brief."), ASK, SAID)),
    "thought": Conversation((ASK, Message("assistant", "1094 km.", reasoning="It is long."))),
    "tools": Conversation((ASK, SAID), (TOOL,)),
    "a call": Conversation((ASK, CALLS), (TOOL,)),
    "a call and its result": Conversation((ASK, CALLS, RESULT, SAID, ASK, SAID), (TOOL,)),
}


@dataclass(frozen=True)
class Pair:
    """A template of a model family, and how TRL has marked it."""

    template: ChatTemplate
    marked: str


@cache
def near_tokenizer():
    """Qwen3's tokenizer with the special tokens of all families."""
    tokenizer = copy.deepcopy(real_tokenizer("qwen3"))
    names = [name for name in ALSO if name not in OWN_TOKENIZERS]
    sources = "".join(original_template(name) for name in names)
    found = re.findall(r"<\|[A-Za-z_/]+\|>|\[gMASK\]|<sop>|<end_of_utterance>|</s>", sources)
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


def characters(tokenizer, row: Encoded) -> tuple[str, list[bool]]:
    """The text of a row, and which of its characters are trained."""
    text, mask = "", []
    for i in range(len(row.ids)):
        longer = tokenizer.decode(row.ids[: i + 1])
        if not longer.endswith("\N{REPLACEMENT CHARACTER}"):
            mask += [row.loss_mask[i]] * (len(longer) - len(text))
            text = longer
    return text, mask


def says(row: Conversation) -> list[str]:
    """What of a row is in its text, whatever the template."""
    calls = [c for m in row.messages for c in m.tool_calls]
    thoughts = [m.reasoning for m in row.messages if m.reasoning]
    return [
        *thoughts,
        *("river_length" for _ in row.tools),
        *(str(c.arguments["river"]) for c in calls),
    ]


def pairs():
    for name in ALSO:
        for kind, row in ROWS.items():
            marks = [] if name in ORDINARY else [pytest.mark.slow]
            yield pytest.param(name, row, marks=marks, id=f"{name}, {kind}")


@pytest.mark.parametrize(("name", "row"), pairs())
def test_the_mask_is_that_of_the_marked_template(name, row):
    try:
        theirs = marked_by_trl(name, row)
    except Exception:  # of jinja, of the template itself, or of Python
        theirs = None
    tokenizer = pair(name).template.tokenizer
    text = "" if theirs is None else tokenizer.decode(theirs.ids)
    if theirs is None or not all(
        word in text.replace(row.messages[0].content, "") for word in says(row)
    ):
        with pytest.raises(RowError):
            encoded_by_us(name, row)
        return
    ours = encoded_by_us(name, row)
    if name not in MERGES:
        assert ours.ids == theirs.ids[: len(ours.ids)]
    our_text, our_mask = characters(tokenizer, ours)
    _, their_mask = characters(tokenizer, theirs)
    assert text.startswith(our_text)
    assert text[len(our_text) :].strip() in ("", *ALSO[name])
    extra = []
    for i, (here, there) in enumerate(zip(our_mask, their_mask, strict=False)):
        assert there >= here, our_text[: i + 1]
        extra.append(there > here)
    found = {
        "".join(our_text[i] for i, _ in run)
        for is_extra, run in groupby(enumerate(extra), key=lambda pair: pair[1])
        if is_extra
    }
    assert found <= {"\n", *ALSO[name]}
