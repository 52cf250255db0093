"""Rows with tools: the template gets them, the calls are trained, and nothing is left out.

The rows of the Berkeley Function Calling Leaderboard have the types of Python and, for each
argument, the values that are right; here a row has the first of them, and an invented result.
"""

import copy
import json
import re
from functools import cache

import pytest

from qlora_lite.data.encoding import encode
from qlora_lite.data.formats import FORMATS, Fields
from qlora_lite.data.messages import Conversation
from qlora_lite.data.row_errors import RowError
from qlora_lite.data.templates import ChatTemplate
from tests.data.marked_templates import pair, require_the_mask_of_trl
from tests.data.real_tokenizers import function_calls, original_template, real_tokenizer
from tests.data.trained_texts import trained_texts

TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
NUM_ROWS = 25


def json_schema(schema):
    """A schema with the types of JSON."""
    if isinstance(schema, list):
        return [json_schema(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: json_schema(value) for key, value in schema.items()}
    if isinstance(found.get("type"), str):
        found["type"] = TYPES.get(found["type"].lower(), found["type"].lower())
    return found


def row_of(found: dict) -> dict:
    """A row as OpenAI's format has it: calls, their results, and an answer."""
    calls = [(n, a) for call in found["ground_truth"] for n, a in call.items()]
    tool_calls = [
        {
            "id": f"call{i:05}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": json.dumps({k: v[0] for k, v in right.items() if v[0] != ""}),
            },
        }
        for i, (name, right) in enumerate(calls)
    ]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": f"result {i}"}
        for i, call in enumerate(tool_calls)
    ]
    answer = {"role": "assistant", "content": "Here are the results."}
    asks = {"role": "assistant", "content": None, "tool_calls": tool_calls}
    tools = [{"type": "function", "function": json_schema(f)} for f in found["function"]]
    return {"messages": [*found["question"][0], asks, *results, answer], "tools": tools}


def conversation(row: dict) -> Conversation:
    return FORMATS["messages"].read(Fields(row, {}))


@cache
def rows(kind: str) -> list[dict]:
    return [row_of(found) for found in function_calls(kind, NUM_ROWS)]


def called(row: dict) -> list[tuple[str, dict]]:
    """The functions that a row calls, with their arguments."""
    functions = [call["function"] for m in row["messages"] for call in m.get("tool_calls", ())]
    return [(f["name"], json.loads(f["arguments"])) for f in functions]


@pytest.mark.parametrize("kind", ["simple_python", "parallel"])
@pytest.mark.parametrize(
    "name",
    [
        *("qwen2_5", "qwen3"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("glm4moe", "gptoss", "lfm2_v2", "nemotron_3_nano", "qwen3_5_think")
        ),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cohere2", "qwen3_6", "gemma3")),
    ],
)
def test_rows_with_calls_have_the_mask_of_the_marked_template(name, kind):
    for row in rows(kind):
        if name == "gptoss" and len(called(row)) > 1:
            with pytest.raises(RowError, match="does not write more than one tool call"):
                pair(name).template.render(conversation(row))
        else:
            require_the_mask_of_trl(name, conversation(row))


@pytest.mark.parametrize("kind", ["simple_python", "parallel"])
def test_the_trained_text_has_the_calls_of_the_row(kind):
    template = pair("qwen3").template
    for row in rows(kind):
        (encoded,) = encode(template, [template.render(conversation(row))])
        first, last = trained_texts(template.tokenizer, encoded.ids, encoded.loss_mask)
        found = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", first, re.DOTALL)
        calls = [json.loads(call) for call in found]
        assert [(call["name"], call["arguments"]) for call in calls] == called(row)
        assert last.endswith("Here are the results.<|im_end|>")


@cache
def llama3_1() -> ChatTemplate:
    tokenizer = copy.copy(real_tokenizer("llama3_1"))
    tokenizer.chat_template = original_template("llama3_1")
    return ChatTemplate(tokenizer)


def test_llama3_1_trains_the_call_and_the_answer():
    """As written in Meta's description of the prompt format of Llama 3.1, with JSON calls."""
    row = {
        "messages": [
            {"role": "user", "content": "How long is the Elbe?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "function": {"name": "length", "arguments": '{"river": "Elbe"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "1094"},
            {"role": "assistant", "content": "1094 km."},
        ],
        "tools": [{"type": "function", "function": {"name": "length", "parameters": {}}}],
    }
    template = llama3_1()
    (encoded,) = encode(template, [template.render(conversation(row))])
    assert trained_texts(template.tokenizer, encoded.ids, encoded.loss_mask) == [
        '{"name": "length", "parameters": {"river": "Elbe"}}<|eot_id|>',
        "1094 km.<|eot_id|>",
    ]
    text = template.tokenizer.decode(encoded.ids)
    assert '{\n    "type": "function",\n    "function": {\n        "name": "length"' in text
    assert text.endswith(
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "length", "parameters": '
        '{"river": "Elbe"}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n"1094"'
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n1094 km.<|eot_id|>"
    )


@pytest.mark.slow
def test_llama3_1_trains_the_calls_of_all_rows():
    template = llama3_1()
    for row in rows("simple_python"):
        (encoded,) = encode(template, [template.render(conversation(row))])
        first, last = trained_texts(template.tokenizer, encoded.ids, encoded.loss_mask)
        call = json.loads(first.removesuffix("<|eot_id|>"))
        assert [(call["name"], call["parameters"])] == called(row)
        assert last == "Here are the results.<|eot_id|>"
