"""Training rows, held-out rows, fingerprints, and real data sets."""

import json

import pytest

from qlora_lite.data.batches import Batches
from qlora_lite.data.load import load_data
from qlora_lite.data.settings import Data
from qlora_lite.foundation.errors import DataError
from tests.tiny import tiny_tokenizer


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(*numbers: int) -> list[dict]:
    return [{"prompt": f"{n} + 1?", "completion": str(n + 1)} for n in numbers]


def texts(examples) -> set[tuple[int, ...]]:
    return {tuple(example.ids.tolist()) for example in examples}


def load(train: str, seed: int = 0, **settings):
    return load_data(Data(train=train, **settings), tiny_tokenizer(), seed)


def test_a_share_is_held_out_and_nothing_is_lost(tmp_path):
    prepared = load(write(tmp_path / "a.jsonl", pairs(*range(100))))
    assert (len(prepared.train), len(prepared.heldout)) == (95, 5)
    assert not texts(prepared.train) & texts(prepared.heldout)
    assert prepared.num_repeated == 0
    assert prepared.heldout_stats is None


def test_held_out_rows_depend_only_on_content_and_seed(tmp_path):
    forward = load(write(tmp_path / "a.jsonl", pairs(*range(100))))
    backward = load(write(tmp_path / "b.jsonl", pairs(*reversed(range(100)))))
    other = load(str(tmp_path / "a.jsonl"), seed=1)
    assert texts(forward.heldout) == texts(backward.heldout) != texts(other.heldout)


def test_duplicates_are_all_trained_or_all_held_out(tmp_path):
    prepared = load(write(tmp_path / "a.jsonl", pairs(*range(40)) * 3), heldout_share=0.2)
    assert not texts(prepared.train) & texts(prepared.heldout)
    assert len(prepared.heldout) == 24


@pytest.mark.parametrize(("share", "most", "count"), [(0.001, 500, 1), (0.5, 7, 7), (0, 500, 0)])
def test_at_least_one_row_is_held_out_and_at_most_as_many_as_allowed(tmp_path, share, most, count):
    name = write(tmp_path / "a.jsonl", pairs(*range(50)))
    prepared = load(name, heldout_share=share, max_heldout_rows=most)
    assert (len(prepared.train), len(prepared.heldout)) == (50 - count, count)


def test_rows_of_the_heldout_file_are_not_trained(tmp_path):
    train = write(tmp_path / "a.jsonl", pairs(*range(50)))
    heldout = write(tmp_path / "b.jsonl", pairs(*range(45, 60)))
    prepared = load(train, heldout=heldout, max_heldout_rows=10)
    assert (len(prepared.train), prepared.num_repeated, len(prepared.heldout)) == (45, 5, 10)
    assert prepared.heldout_stats.rows == 15
    assert prepared.heldout_source.where(3) == f"{heldout}, line 3"


def test_training_rows_that_are_all_held_out_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    data = Data(train=str(tmp_path / "a.jsonl"), heldout=str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match=r"every row is also in data\.heldout"):
        load_data(data, tiny_tokenizer(), 0)


def test_a_missing_heldout_file_is_reported_before_rows_are_read(tmp_path):
    (tmp_path / "train.jsonl").write_text("{not json}")
    data = Data(train=str(tmp_path / "train.jsonl"), heldout=str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match=r"data\.heldout='.*gone\.jsonl', which is not a file"):
        load_data(data, tiny_tokenizer(), 0)


def test_a_single_row_needs_a_heldout_share_of_0(tmp_path):
    name = write(tmp_path / "a.jsonl", pairs(1))
    with pytest.raises(DataError, match="no row is left to train on"):
        load(name)
    assert len(load(name, heldout_share=0).train) == 1


def test_rows_that_are_all_equal_are_named(tmp_path):
    name = write(tmp_path / "a.jsonl", pairs(1) * 1000)
    with pytest.raises(DataError, match=r"all 1,000 rows are equal"):
        load(name)
    assert load(name, heldout_share=0).stats.equal_rows == 999


def test_max_rows_stops_reading(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, pairs(*range(10)))
    path.write_text(path.read_text() + "{broken")
    assert load(str(path), max_rows=10, heldout_share=0).stats.rows == 10


def test_the_fingerprint_depends_on_everything_that_changes_the_tokens(tmp_path):
    name = write(tmp_path / "a.jsonl", pairs(*range(10)))
    first = load(name)
    assert load(write(tmp_path / "b.jsonl", pairs(*range(10)))).fingerprint == first.fingerprint

    def changed(prepared) -> list[str]:
        return [k for k, v in prepared.fingerprints.items() if v != first.fingerprints[k]]

    other_template = tiny_tokenizer()
    other_template.chat_template = "A talk. " + other_template.chat_template
    other_tokens = tiny_tokenizer()
    other_tokens.add_tokens(["river"])
    data = Data(train=name)
    assert changed(load_data(data, other_template, 0)) == ["template"]
    assert changed(load_data(data, other_tokens, 0)) == ["tokenizer"]
    assert changed(load(name, loss_on="all")) == ["settings"]
    assert changed(load(name, seed=1)) == ["settings"]
    assert changed(load(write(tmp_path / "b.jsonl", pairs(*range(11))))) == ["train", "heldout"]


REAL = {
    "gsm8k": (
        {"train": "gsm8k/train.jsonl", "heldout": "gsm8k/test.jsonl"},
        {"fields": {"prompt": "question", "completion": "answer"}},
    ),
    "e2e": (
        {"train": "e2e/train.csv"},
        {"fields": {"prompt": "mr", "completion": "ref"}},
    ),
    "sst2": (
        {"train": "sst2/train.tsv", "heldout": "sst2/dev.tsv"},
        {
            "columns": ["text", "label"],
            "fields": {"completion": "label"},
            "prompt": "Sentence: {text}\nSentiment:",
        },
    ),
    "text": ({"train": "text/tinyshakespeare.txt"}, {}),
}


@pytest.mark.parametrize(("files", "settings"), REAL.values(), ids=REAL)
def test_real_files_become_steps(test_data, files, settings):
    paths = {name: str(test_data / path) for name, path in files.items()}
    tokenizer = tiny_tokenizer()
    data = Data(**paths, **settings, max_tokens=1500, max_rows=500)
    prepared = load_data(data, tokenizer, 0)
    assert prepared.stats.lost_tokens == 0
    assert not texts(prepared.train) & texts(prepared.heldout)

    run = Batches(prepared.train, max_tokens=1500, tokens_per_step=1500, seed=0)
    seen = [batch for i in range(run.steps) for batch in run.step(i)]
    assert sum(batch.num_targets for batch in seen) == prepared.train.num_targets
    assert sum(batch.num_tokens for batch in seen) == prepared.train.num_tokens
    # at most 5 % of a bin stay empty
    assert run.bins_per_epoch * 1500 * 0.95 < prepared.train.num_tokens


def test_the_trained_tokens_of_real_rows_are_the_answers(test_data):
    path = test_data / "gsm8k" / "test.jsonl"
    tokenizer = tiny_tokenizer()
    fields = {"prompt": "question", "completion": "answer"}
    data = Data(train=str(path), fields=fields, max_rows=200, heldout_share=0, max_tokens=2000)
    answers = [json.loads(line)["answer"] for line in path.open()][:200]
    train = load_data(data, tokenizer, 0).train
    trained = [tokenizer.decode(example.ids[example.loss_mask]) for example in train]
    assert trained == [f"{answer.strip()}<|end|>" for answer in answers]
