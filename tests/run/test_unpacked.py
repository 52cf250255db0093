"""A base whose packed rows would see each other is trained on single rows, and both say so."""

import pytest

from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model import facts as facts_module
from qlora_lite.run import merge_check, scoring, training
from qlora_lite.run.merging import merge
from qlora_lite.run.scoring import score_targets
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import recipe_in, write_rows
from tests.families import VOCABULARY, tiny_of
from tests.tiny import tiny_tokenizer


class Notes(Watcher):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of OPT, and rows."""
    folder = tmp_path_factory.mktemp("unpacked")
    tiny_of("opt", vocab_size=VOCABULARY).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(folder / "train.jsonl")
    return folder


def recorded(monkeypatch, module, name):
    """The batches that a function of `module` makes."""
    make, made = getattr(module, name), []

    def record(*given, **options):
        batches = make(*given, **options)
        made.append(batches if name == "training_batches" else list(batches))
        return made[-1]

    monkeypatch.setattr(module, name, record)
    return made


def are_single(batches):
    return all(len(batch.rows) == len(batch.input_ids) for batch in batches)


@pytest.mark.parametrize("is_known", [True, False])
def test_rows_of_opt_are_not_packed_whether_the_table_knows_it_or_the_probe_finds_it(
    folder, monkeypatch, is_known
):
    if not is_known:
        monkeypatch.setattr(facts_module, "UNPACKED", frozenset())
    made = recorded(monkeypatch, training, "training_batches")
    watcher = Notes()
    run_recipe(recipe_in(folder, f"run-{is_known}", "optim.steps=1"), watcher=watcher)
    assert sum("rows are not packed" in note for note in watcher.notes) == 1
    assert are_single(made[0].step(0))


def test_rows_of_opt_are_scored_one_by_one_by_merge_and_eval(folder, monkeypatch):
    changes = ("optim.steps=1", "data.heldout_share=0")
    run = run_recipe(recipe_in(folder, "run", *changes)).directory
    for module, use in (
        (merge_check, lambda: merge(run, folder / "out", base="trained")),
        (scoring, lambda: score_targets([str(run)], data=str(folder / "train.jsonl"))),
    ):
        made = recorded(monkeypatch, module, "evaluation_batches")
        use()
        assert made
        assert all(map(are_single, made))
