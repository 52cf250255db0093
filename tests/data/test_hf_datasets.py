"""Local files leave nothing in the cache of `datasets`, which prints nothing."""

import datasets
import pytest

from qlora_lite.data.sources import open_source
from qlora_lite.foundation.errors import DataError

LINE = '{"prompt": "a", "completion": "b"}'
TABLE = "prompt,completion\na,b\n"


def rows(name: str) -> list[tuple[int, dict]]:
    return list(open_source(name).rows())


def test_nothing_is_copied_into_the_cache_of_datasets(write, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    assert len(rows(write("a.jsonl", LINE))) == 1
    assert len(rows(write("a.csv", TABLE))) == 1
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.fixture
def talkative():
    """`datasets` logs everything and draws progress bars."""
    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_info()
    datasets.enable_progress_bars()
    yield
    datasets.logging.set_verbosity(before[0])
    if before[1]:
        datasets.disable_progress_bars()


def test_nothing_is_printed_and_the_settings_of_datasets_are_restored(talkative, write, capfd):
    with pytest.raises(DataError):
        rows(write("a.jsonl", LINE + "\n{"))
    rows(write("a.csv", TABLE))
    assert capfd.readouterr() == ("", "")
    assert datasets.logging.get_verbosity() == datasets.logging.INFO
    assert not datasets.are_progress_bars_disabled()
