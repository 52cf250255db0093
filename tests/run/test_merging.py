"""`merge`: from a run's folder to a model directory, compared with the trained model."""

import dataclasses
import json
import runpy
import shutil
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lite.data.messages import Message
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.errors import ExportError, RunError
from qlora_lite.report import page as report
from qlora_lite.run import merge_check, merging
from qlora_lite.run.extracting import extract
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from qlora_lite.shards.writer import ShardWriter
from tests.damage import count_disk_calls, die_at_disk_call, flip_bit, fork, reseal
from tests.end_to_end.small_run import small_recipe, write_rows
from tests.export.trained import stored
from tests.tiny import save_tiny

BF16 = 8 * 2**-9
"""Relative error of logits: eight products in a row, whose weights were rounded to bf16. Without
the adapter it would be 0.65 here."""

CARD = """---
license: other
license_name: "tricky: 'name' #1"
---
# Base
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base with licences and a card, rows, and a finished run."""
    folder = tmp_path_factory.mktemp("merging")
    base = save_tiny(folder / "base", tied=True, dtype=torch.bfloat16)
    (base / "README.md").write_text(CARD)
    (base / "LICENSE.txt").write_text("free")
    (base / "USE_POLICY.md").write_text("be kind")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    recipe = small_recipe(base, write_rows(folder / "rows.jsonl"), folder / "run")
    run_recipe(recipe.but("data.system=/be brief", "evaluation.samples=1"))
    return folder


@pytest.fixture(scope="module")
def merged(folder):
    return merge(folder / "run", folder / "merged")


def test_the_better_base_is_written_and_marked_in_the_table(merged):
    labels = ["adapter on its base", "merged on the base as trained", "merged on the original base"]
    assert [row.candidate for row in merged.table] == labels
    written = [row for row in merged.table if row.written]
    assert len(written) == 1
    assert written[0].loss == min(row.loss for row in merged.table[1:])
    assert written[0].candidate == merge_check.LABELS[merged.base]
    assert merged.table[0].agreement is None
    assert merged.base == "trained"
    assert merged.table[1].agreement == merged.written.top1
    assert merged.table[1].agreement >= merged.table[2].agreement > 0
    assert merged.exact.is_exact
    assert merged.written.relative_error < BF16


def test_the_files_are_the_exact_merge_rounded_once(folder, merged, tmp_path):
    exact = merge(folder / "run", tmp_path / "out", base=merged.base, dtype="fp32", verify=False)
    found, expected = stored(merged.out), stored(exact.out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in found)


def test_the_directory_has_the_files_that_other_tools_read(folder, merged):
    names = {path.name for path in merged.out.iterdir()}
    assert names == {
        "README.md",
        "LICENSE.txt",
        "USE_POLICY.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qlora_lite.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    config = json.loads((merged.out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    generation = json.loads((merged.out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1
    assert {t.dtype for t in stored(merged.out).values()} == {torch.bfloat16}
    assert merged.num_bytes == sum(2 * t.numel() for t in stored(merged.out).values())
    rows = [{"role": "user", "content": "one"}]
    ours = AutoTokenizer.from_pretrained(merged.out)
    theirs = AutoTokenizer.from_pretrained(folder / "base")
    assert ours.apply_chat_template(rows) == theirs.apply_chat_template(rows)


def test_plain_transformers_predicts_the_same_tokens_as_the_run(folder, merged):
    model = AutoModelForCausalLM.from_pretrained(merged.out, dtype=torch.float32)
    trained = load_run(folder / "run")
    trained.attached.train(False)
    ids = torch.randint(4, 400, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model(ids).logits, trained.model(ids).logits
    assert (found - expected).norm() < BF16 * expected.norm()


def test_the_report_and_the_card_contain_the_table(folder, merged):
    assert report.read(folder / "run" / "report.html").merges == merged.table
    card = (merged.out / "README.md").read_text()
    for row in merged.table:
        assert f"{row.loss:.4f}" in card
    assert str(folder) not in card
    assert '"system": "/be brief"' in card
    for part in ("qlora-lite merge", '"tokens_per_step": 256', "peak", "training time", "before:"):
        assert part in card


def test_the_head_of_the_card_is_the_hubs_yaml(merged):
    assert metadata_load(merged.out / "README.md") == {
        "library_name": "transformers",
        "license": "other",
        "license_name": "tricky: 'name' #1",
        "pipeline_tag": "text-generation",
    }


def test_with_a_given_base_and_without_verify_no_model_is_loaded(folder, tmp_path, monkeypatch):
    for loader in ("load_run", "read_back", "candidate"):
        monkeypatch.delattr(merge_check, loader)
    for base in ("trained", "original"):
        result = merge(
            folder / "run", tmp_path / base, base=base, dtype="fp32", shard="20kB", verify=False
        )
        assert result.base == base
        assert result.table == ()
        assert len(list(result.out.glob("*.safetensors"))) > 3


@pytest.fixture(scope="module")
def fp32_run(folder):
    """A finished run on a base in fp32, where every rounding of training changes weights."""
    base = save_tiny(folder / "fp32-base")
    run_recipe(small_recipe(base, folder / "rows.jsonl", folder / "fp32-run", "optim.steps=1"))
    return folder / "fp32-run"


def files_of_merge(run, out):
    """The written weights on the trained base, by file."""
    merge(run, out, base="trained", dtype="fp32", verify=False)
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("name", ["compute", "storage", "norms"])
def test_a_merge_rounds_as_training_did_whatever_this_machine_would(
    fp32_run, tmp_path, monkeypatch, name
):
    expected = files_of_merge(fp32_run, tmp_path / "expected")
    here = devices.choose("cpu")
    other = torch.float32 if getattr(here, name) is torch.bfloat16 else torch.bfloat16
    rule = dataclasses.replace(here, **{name: other})
    monkeypatch.setattr(devices, "choose", lambda *_, **__: rule)
    assert files_of_merge(fp32_run, tmp_path / "elsewhere") == expected

    run = shutil.copytree(fp32_run, tmp_path / "run")  # as if trained with the other dtype
    sidecar = run / "adapter" / "qlora_lite.json"
    record = json.loads(sidecar.read_text())
    assert record["base"][name] == devices.NAMES[getattr(here, name)]
    record["base"][name] = devices.NAMES[other]
    sidecar.write_text(json.dumps(record))
    reseal(run / "adapter")
    monkeypatch.undo()
    assert files_of_merge(run, tmp_path / "differs") != expected


def test_fp32_files_on_the_trained_base_are_exact(folder, tmp_path):
    result = merge(folder / "run", tmp_path / "out", base="trained", dtype="fp32", verify=True)
    assert result.written.is_exact
    assert result.written.top1 == 1


def test_a_merge_killed_during_its_check_continues_without_writing_again(
    folder, tmp_path, monkeypatch
):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_check, "read_back", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(folder / "run", tmp_path / "out", base="trained", verify=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ShardWriter, "write", None)
    merge(folder / "run", tmp_path / "out", base="trained", verify=True)
    assert not any(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


def _merge(folder, out):
    return merge(folder / "run", out, base="trained", shard="60kB", verify=False)


def _merge_and_die(folder, out, call):
    die_at_disk_call(call)
    _merge(folder, out)


def files_in(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """The files of a merge, without its card, and the number of its disk calls."""
    with pytest.MonkeyPatch.context() as patch:
        calls = count_disk_calls(patch)
        _merge(folder, folder / "uninterrupted")
        return files_in(folder / "uninterrupted"), len(calls)


def moments():
    """Disk calls counted from the first (the journal is 1 to 3) or, negative, from the last."""
    for call in (1, 4, 6, 7, 8, -1, -2, -3, -4, -6, -30):
        yield call
    for call in range(9, 70):
        yield pytest.param(call, marks=pytest.mark.slow)


@pytest.mark.parametrize("call", list(moments()))
def test_the_same_command_ends_after_a_kill_at_any_sync_or_rename(
    folder, tmp_path, uninterrupted, call
):
    expected, num_calls = uninterrupted
    out = tmp_path / "uninterrupted"
    number = call if call > 0 else num_calls + 1 + call
    if number > num_calls:
        pytest.skip("a merge has fewer disk calls")
    child = fork.Process(target=_merge_and_die, args=(folder, out, number))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert _merge(folder, out).already_finished == (number == num_calls)
    assert files_in(out) == expected
    assert _merge(folder, out).already_finished
    assert [path.name for path in tmp_path.iterdir()] == ["uninterrupted"]


def test_a_finished_merge_that_was_damaged_is_named(folder, tmp_path):
    _merge(folder, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("my own card")
    assert _merge(folder, tmp_path / "out").already_finished
    with pytest.raises(ExportError, match="exists already"):
        merge(folder / "run", tmp_path / "out", base="original", verify=False)
    flip_bit(tmp_path / "out" / "tokenizer.json", 100)
    with pytest.raises(ExportError, match=r"tokenizer\.json changed since it was written"):
        _merge(folder, tmp_path / "out")


def test_unfinished_work_of_another_merge_is_not_continued(folder, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "write_companions", None)
        with pytest.raises(TypeError):
            merge(folder / "run", tmp_path / "out", base="original", verify=False)
    (tmp_path / ".out.writing" / "LICENSE-of-another").write_text("")
    result = merge(folder / "run", tmp_path / "out", base="trained", verify=False)
    expected = merge(folder / "run", tmp_path / "expected", base="trained", verify=False)
    assert not (result.out / "LICENSE-of-another").exists()
    assert (result.out / "model.safetensors").read_bytes() == (
        expected.out / "model.safetensors"
    ).read_bytes()


def test_nothing_is_overwritten(folder, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ExportError, match="exists already"):
        merge(folder / "run", tmp_path)
    with pytest.raises(ExportError, match="exists already"):
        merge(folder / "run", tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_directory_may_be_filled(folder, tmp_path):
    (tmp_path / "out").mkdir()
    result = merge(folder / "run", tmp_path / "out", base="trained", verify=False)
    assert (result.out / "model.safetensors").is_file()


def test_every_output_of_a_base_without_a_template_has_the_one_of_training(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    (base / "chat_template.jinja").unlink()
    recipe = small_recipe(base, folder / "rows.jsonl", tmp_path / "run", "adapter=dylora")
    run_recipe(recipe.but("optim.steps=1", "evaluation.samples=0"))
    merge(tmp_path / "run", tmp_path / "merged", base="original", verify=False)
    extract(tmp_path / "run", tmp_path / "extracted", 2)
    rows = [{"role": "user", "content": "one"}]
    prompts = {
        AutoTokenizer.from_pretrained(out).apply_chat_template(rows, tokenize=False)
        for out in (tmp_path / "merged", tmp_path / "extracted", tmp_path / "run" / "adapter")
    }
    template = ChatTemplate(AutoTokenizer.from_pretrained(base))
    assert template.is_plain
    assert prompts == {template.prompt([Message("user", "one")])}


def test_a_base_that_changed_is_refused(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    other = save_tiny(tmp_path / "other", tied=True, dtype=torch.bfloat16, seed=1)
    record = (tmp_path / "run" / "recipe.json").read_text()
    record = record.replace(str(folder / "base"), str(other))
    (tmp_path / "run" / "recipe.json").write_text(record)
    with pytest.raises(RunError, match="not the one"):
        merge(tmp_path / "run", tmp_path / "out")


def test_a_run_that_is_missing_or_not_finished_is_refused(folder, tmp_path):
    with pytest.raises(RunError, match="not a run"):
        merge(tmp_path / "nowhere", tmp_path / "out")
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(RunError, match="not finished"):
        merge(tmp_path / "run", tmp_path / "out")


def test_without_held_out_rows_the_trained_base_is_used_and_checked(folder, tmp_path):
    recipe = small_recipe(folder / "base", folder / "rows.jsonl", tmp_path / "run")
    run_recipe(recipe.but("data.heldout_share=0", "optim.steps=3"))
    result = merge(tmp_path / "run", tmp_path / "out")
    assert result.base == "trained"
    assert result.table == ()
    assert result.exact.is_exact
    assert any("no rows are held out" in note for note in result.notes)


def test_a_run_without_its_report_can_be_merged(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    result = merge(tmp_path / "run", tmp_path / "out", base="trained", verify=False)
    assert "## Loss" in (result.out / "README.md").read_text()


def test_the_script_does_what_the_command_does(folder, tmp_path, monkeypatch):
    script = Path(merging.__file__).parents[2] / "tools" / "merge_and_export.py"
    out = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", [str(script), str(folder / "run"), str(out), "--base", "trained"]
    )
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(script), run_name="__main__")
    assert exit_info.value.code in (0, None)
    assert (out / "model.safetensors").is_file()
