"""The `data` settings: values that are accepted in two forms, and values that are refused."""

import pytest
from pydantic import ValidationError

from qlora_lite.data.formats import FORMATS
from qlora_lite.data.settings import FIELDS, Data


def test_fields_can_be_json_text():
    mapping = {"prompt": "question", "completion": "answer"}
    text = '{"prompt": "question", "completion": "answer"}'
    assert Data(train="a.jsonl", fields=text).fields == mapping
    with pytest.raises(ValidationError, match=r"fields"):
        Data(train="a.jsonl", fields="question")


def test_an_unknown_field_is_refused_with_the_closest_one():
    with pytest.raises(ValidationError, match=r"'promt' is not a field .* mean 'prompt'"):
        Data(train="a.jsonl", fields={"promt": "question"})


@pytest.mark.parametrize("prompt", ["no field", "{}", "{text.__class__}", "{0}", "{text"])
def test_a_prompt_that_names_no_field_is_refused(prompt):
    with pytest.raises(ValidationError):
        Data(train="a.csv", prompt=prompt)


def test_a_prompt_from_a_shell_has_line_breaks_and_tabs():
    assert Data(train="a.csv", prompt=r"{text}\n\tSentiment:").prompt == "{text}\n\tSentiment:"


def test_fields_are_those_that_the_formats_read():
    needed = {field for known in FORMATS.values() for field in known.needs}
    assert set(FIELDS) == needed | {"input"}
