"""Data sets of the hub, read from the cache without a network."""

import datasets
import huggingface_hub
import pytest
from datasets.arrow_writer import ArrowWriter

from qlora_lite.data.hub import parse_hub_id
from qlora_lite.data.sources import open_source
from qlora_lite.foundation.errors import DataError

PAIR = {"prompt": "2 + 2?", "completion": "4"}


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("acme/sums", ("acme/sums", None, None)),
        ("acme/sums:main", ("acme/sums", "main", None)),
        ("acme/sums::test", ("acme/sums", None, "test")),
        ("acme/sums:main::train[:10%]", ("acme/sums", "main", "train[:10%]")),
        ("sums", None),
        ("a/b/c", None),
        ("acme/sums:", None),
    ],
)
def test_an_id_has_a_repository_a_configuration_and_a_split(name, parts):
    assert parse_hub_id(name) == parts


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """A cache with one data set of the hub, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "acme___sums" / "main" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list([PAIR])
    writer = ArrowWriter(path=str(folder / "sums-train.arrow"), features=table.features)
    writer.write(PAIR)
    num_examples, num_bytes = writer.finalize()
    info = table.info
    info.builder_name = info.dataset_name = "sums"
    info.config_name, info.version = "main", datasets.Version("0.0.0")
    split = datasets.SplitInfo("train", num_bytes, num_examples, dataset_name="sums")
    info.splits = datasets.SplitDict({"train": split})
    info.write_to_directory(str(folder))


@pytest.mark.parametrize("name", ["acme/sums", "acme/sums:main", "acme/sums:main::train"])
def test_a_data_set_of_the_hub_is_read_from_its_cache(offline_hub, name):
    source = open_source(name)
    assert list(source.rows()) == [(1, PAIR)]
    assert source.where(1) == f"{name}, row 1"
    assert source.fingerprint == f"main/0.0.0/{'0' * 40}/sums-train.arrow"


@pytest.mark.parametrize("name", ["acme/others", "acme/sums:other", "acme/sums::test"])
def test_a_data_set_that_cannot_be_loaded_is_refused(offline_hub, name):
    with pytest.raises(DataError, match=f"the data set '{name}' cannot be read"):
        open_source(name)
