"""The `data` settings: values that are accepted in two forms, and values that are refused."""

import pytest
from pydantic import ValidationError

from qlora_lite.data.formats import FORMATS
from qlora_lite.data.settings import FIELDS, Data
from qlora_lite.data.source_names import require_source
from qlora_lite.foundation.errors import DataError


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
    assert set(FIELDS) == needed | {"input", "tools"}


def test_reasoning_is_no_context_if_all_of_the_text_is_trained():
    with pytest.raises(ValidationError, match=r"data\.loss_on=all trains all of the text"):
        Data(train="a.jsonl", loss_on="all", reasoning="context")


def test_rows_are_held_out_from_one_source():
    with pytest.raises(ValueError, match=r"data\.heldout='b\.jsonl' is given too"):
        Data(train="a.jsonl", heldout="b.jsonl", heldout_share=0.1)
    for share in (0, 0.05):
        assert Data(train="a.jsonl", heldout="b.jsonl", heldout_share=share).heldout == "b.jsonl"


def test_a_share_in_the_place_of_a_file_is_recognised(tmp_path):
    with pytest.raises(ValueError, match=r"data\.heldout_share=0\.1"):
        Data(train="a.jsonl", heldout=0.1)
    with pytest.raises(DataError, match=r"a number, .* data\.heldout_share=0\.1"):
        require_source("data.heldout", "0.1")


def test_a_folder_names_the_files_in_it(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "data/test.parquet", "README.md", *(f"{n}.csv" for n in range(5))):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError) as caught:
        require_source("data.train", str(tmp_path))
    assert "is a folder" in str(caught.value)
    assert f"such as {tmp_path}/0.csv, {tmp_path}/1.csv" in str(caught.value)
    assert str(caught.value).endswith("and 2 more")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"Give one file: a file \(\.jsonl"):
        require_source("data.train", str(tmp_path / "empty"))
