"""Exit statuses and error messages."""

import errno

import pytest

from qlora_lite.cli.status import status_of
from qlora_lite.foundation.errors import Interrupted, QloraLiteError
from tests.cli.workplace import run_command, start_process


def _raising(error):
    def command():
        raise error

    return command


def test_a_command_that_returns_has_status_0(capsys):
    assert status_of(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", QloraLiteError.__subclasses__())
def test_a_mistake_is_one_message_on_stderr_with_status_2(kind, capsys):
    text = "rows.jsonl, line 3: [field] is missing, and this sentence is longer than a line " * 3
    assert status_of(_raising(kind(text))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {text}\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_a_limit_of_the_disk_names_the_file(number, capsys):
    assert status_of(_raising(OSError(number, "cannot", "/some/file"))) == 2
    assert capsys.readouterr().err == "error: /some/file: cannot\n"


@pytest.mark.parametrize("error", [ValueError("unforeseen"), OSError(errno.EIO, "broken", "x")])
def test_a_bug_prints_its_traceback_with_status_1(error, capsys):
    assert status_of(_raising(error)) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "Please report it" in err


@pytest.mark.parametrize("error", [Interrupted("saved after step 3"), KeyboardInterrupt()])
def test_an_interruption_has_status_130(error, capsys):
    assert status_of(_raising(error)) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_usage_error_has_status_2_and_the_nearest_match():
    ended = run_command("trian")
    assert ended.status == 2
    assert "Did you mean 'train'" in ended.err


def test_an_unknown_option_has_status_2(recipe):
    assert run_command("train", recipe, "--steps=3").status == 2


def test_errors_in_settings_do_not_mention_pydantic(recipe):
    ended = run_command("plan", recipe, "optim.lr=-1", "data.max_tokens=many", "adapter.rnk=3")
    assert ended.status == 2
    assert "pydantic" not in ended.out + ended.err
    assert "adapter.rnk" in ended.err


def test_a_wrong_field_in_a_recipe_file_has_status_2(recipe):
    recipe.write_text(recipe.read_text().replace("rank=4", "rnk=4"), encoding="utf-8")
    ended = run_command("plan", recipe)
    assert ended.status == 2
    assert "pydantic" not in ended.err
    assert "rnk" in ended.err


def test_an_error_in_the_data_names_its_line(recipe, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"messages": 3}\n', encoding="utf-8")
    ended = run_command("train", recipe)
    assert ended.status == 2
    assert "line 1" in ended.err


def test_a_closed_pipe_has_status_0(recipe):
    program = "from qlora_lite.cli import main; main()"
    process = start_process("-c", program, "plan", recipe)
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert "Traceback" not in process.stderr.read()
