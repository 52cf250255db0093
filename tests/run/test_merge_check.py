"""The check of a merge finds what is wrong."""

import pytest
import torch

from qlora_lite.run import merge_check
from qlora_lite.run.merging import merge
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import small_recipe, write_rows
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge-check")
    recipe = small_recipe(
        save_tiny(folder / "base"), write_rows(folder / "rows.jsonl"), folder / "run"
    )
    return run_recipe(recipe.but("optim.steps=3", "evaluation.samples=0")).directory


def broken(build):
    """`build`, but one weight of the model that it returns is wrong."""

    def build_broken(*arguments):
        model = build(*arguments)
        with torch.no_grad():
            model.module.model.norm.weight[0] += 1
        return model

    return build_broken


def test_merged_weights_that_are_wrong_before_rounding_are_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_check, "candidate", broken(merge_check.candidate))
    with pytest.raises(AssertionError, match="the merged model differs from the trained one"):
        merge(run, tmp_path / "out", base="auto")
    assert not (tmp_path / "out").exists()


def test_fp32_files_that_are_wrong_are_not_renamed_to_their_place(run, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_check, "read_back", broken(merge_check.read_back))
    with pytest.raises(AssertionError, match="differs from the trained model"):
        merge(run, tmp_path / "out", base="trained", dtype="fp32")
    assert not (tmp_path / "out").exists()


def test_changed_data_is_noted(run, tmp_path):
    write_rows(run.parent / "rows.jsonl", 130)
    result = merge(run, tmp_path / "out", base="trained")
    write_rows(run.parent / "rows.jsonl")
    assert any(note.startswith("the data changed since the run") for note in result.notes)
