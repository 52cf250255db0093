"""A base whose packed rows would see each other is trained on single rows, and both say so."""

import pytest

from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model import facts as facts_module
from qlora_lite.run import job, training
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import recipe_in, write_rows
from tests.families import VOCABULARY, tiny_of
from tests.tiny import tiny_tokenizer


class Notes(Watcher):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("is_known", [True, False])
def test_rows_of_opt_are_not_packed_whether_the_table_knows_it_or_the_probe_finds_it(
    tmp_path, monkeypatch, is_known
):
    tiny_of("opt", vocab_size=VOCABULARY).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl")
    if not is_known:
        monkeypatch.setattr(facts_module, "UNPACKED", frozenset())
    made = []

    def batches(*given):
        made.append(job.training_batches(*given))
        return made[-1]

    monkeypatch.setattr(training, "training_batches", batches)
    watcher = Notes()
    run_recipe(recipe_in(tmp_path, "run", "optim.steps=1"), watcher=watcher)
    assert sum("rows are not packed" in note for note in watcher.notes) == 1
    for batch in made[0].step(0):
        assert len(batch.rows) == len(batch.input_ids)
