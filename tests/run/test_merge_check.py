"""The check of a merge finds what is wrong."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lite import export
from qlora_lite.foundation.errors import AdapterError, CheckError
from qlora_lite.recipe_files import load_recipe
from qlora_lite.run import merge_check, merging
from qlora_lite.run.extracting import extract
from qlora_lite.run.loading import load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.scoring import score_targets
from qlora_lite.run.training import run_recipe
from tests.cli.workplace import run_command
from tests.damage import reseal
from tests.end_to_end.small_run import small_recipe, write_rows
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge-check")
    recipe = small_recipe(
        save_tiny(folder / "base"), write_rows(folder / "rows.jsonl"), folder / "run"
    )
    return run_recipe(recipe.but("optim.steps=3", "evaluation.samples=0")).directory


def changed(build, change):
    """`build`, but the model that it returns is changed."""

    def build_changed(*arguments):
        model = build(*arguments)
        with torch.no_grad():
            change(model.module)
        return model

    return build_changed


def one_weight(model):
    model.model.norm.weight[0] += 1


def not_finite(model):
    model.lm_head.weight[3, 2] = torch.nan


def a_seventh_is_garbage(model):
    for parameter in model.parameters():
        flat = parameter.view(-1)
        flat[::7] = torch.randn_like(flat[::7]) * flat.std()


DAMAGES = [one_weight, not_finite, a_seventh_is_garbage]


def refused(run, out, pattern, **options):
    with pytest.raises(CheckError, match=pattern):
        merge(run, out, **options)
    assert not out.exists()
    assert not out.with_name(f".{out.name}.writing").exists()


def test_merged_weights_that_are_wrong_before_rounding_are_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_check, "candidate", changed(merge_check.candidate, one_weight))
    refused(run, tmp_path / "out", "before rounding", base="auto")


@pytest.mark.parametrize("damage", [not_finite, a_seventh_is_garbage])
@pytest.mark.parametrize(
    ("base", "dtype"), [("trained", "fp32"), ("trained", "bf16"), ("original", "fp16")]
)
def test_a_merged_model_that_is_not_the_trained_one_is_not_written(
    run, tmp_path, monkeypatch, base, dtype, damage
):
    monkeypatch.setattr(merge_check, "candidate", changed(merge_check.candidate, damage))
    monkeypatch.delattr(merging, "write")
    refused(run, tmp_path / "out", "is not the trained one", base=base, dtype=dtype)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_files_that_are_not_the_merged_model_are_deleted(run, tmp_path, monkeypatch, dtype, damage):
    monkeypatch.setattr(merge_check, "read_back", changed(merge_check.read_back, damage))
    refused(run, tmp_path / "out", "files read back", base="original", dtype=dtype)


def test_files_in_16_bit_may_differ_by_a_few_roundings_only(run, tmp_path, monkeypatch):
    recipe = load_recipe(run).but("base.compute=bf16", "optim.steps=1", f"output={tmp_path}/run")
    half = run_recipe(recipe).directory
    monkeypatch.setattr(merge_check, "read_back", changed(merge_check.read_back, one_weight))
    refused(half, tmp_path / "out", "files read back", base="trained")


def test_a_failed_check_has_status_1_and_one_message(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_check, "read_back", changed(merge_check.read_back, not_finite))
    ended = run_command("merge", run, tmp_path / "out", "--base", "trained")
    assert ended.status == 1
    assert "check failed: the files read back" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_with_a_value_that_is_not_finite_is_refused(run, tmp_path, value):
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    native = broken / "adapter" / "native.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(native).items()}
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = value
    save_file(tensors, native)
    reseal(broken / "adapter")
    for use in (
        lambda: merge(broken, tmp_path / "out", base="trained", verify=False),
        lambda: load_run(broken),
        lambda: score_targets([str(broken)]),
        lambda: extract(broken, tmp_path / "out", 4),
    ):
        with pytest.raises(AdapterError, match=f"{name} .*not finite"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_rounding_that_overflows_is_refused(run, tmp_path, monkeypatch):
    rows = export.merge._adapted_rows
    monkeypatch.setattr(
        export.merge, "_adapted_rows", lambda layer: (part * 1e7 for part in rows(layer))
    )
    options = {"base": "trained", "dtype": "fp16", "verify": False}
    refused(run, tmp_path / "out", "too large for float16", **options)


def test_changed_data_is_noted(run, tmp_path):
    write_rows(run.parent / "rows.jsonl", 130)
    result = merge(run, tmp_path / "out", base="trained")
    write_rows(run.parent / "rows.jsonl")
    assert any(note.startswith("the data changed since the run") for note in result.notes)
