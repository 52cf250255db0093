"""Records with hashes."""

import json

import pytest

from qlora_lite.foundation.sealed import hashes_of, read_sealed, require_files, write_sealed
from tests.damage import flip_bit


@pytest.fixture
def record(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"")
    write_sealed(tmp_path / "r.json", {"x": [1, 0.1, "\u00e4"]}, hashes_of(tmp_path, ["a", "b"]))
    return tmp_path / "r.json"


def test_a_record_is_read_as_it_was_written(record):
    found = read_sealed(record, "x")
    assert found["x"] == [1, 0.1, "\u00e4"]
    require_files(record.parent, found)


def test_no_flipped_bit_of_a_record_is_accepted(record):
    value = read_sealed(record)
    for position in range(len(record.read_bytes())):
        flip_bit(record, position)
        try:
            found = read_sealed(record)
        except ValueError:
            found = value
        # the name of the seal itself, or white space
        assert found.items() >= value.items()
        flip_bit(record, position)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_missing_or_changed_file_is_named(record, name):
    file = record.parent / name
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ValueError, match=f"{name} changed since it was written"):
        require_files(record.parent, read_sealed(record))
    file.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        require_files(record.parent, read_sealed(record))
    require_files(record.parent, read_sealed(record), "c")


def test_a_record_without_its_hash_is_refused(record):
    record.write_text(json.dumps({"x": 1}))
    with pytest.raises(ValueError, match="it has no sha256"):
        read_sealed(record, "x")
