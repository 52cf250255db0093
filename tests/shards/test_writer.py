"""The safetensors library reads back what was written, also after kills in between."""

import json
import multiprocessing
import os
import signal
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qlora_lite.foundation.errors import ExportError, RunError
from qlora_lite.shards.layout import TensorSpec
from qlora_lite.shards.reader import SafetensorsCheckpoint
from qlora_lite.shards.writer import ShardWriter, save_tensors
from tests.damage import flip_bit
from tests.disk_calls import record_disk_calls

TENSORS = {
    "embed": torch.arange(60.0).view(10, 6),
    "norm": torch.arange(3, dtype=torch.bfloat16),
    "linear": torch.arange(35, dtype=torch.float16).view(5, 7),
    "scalar": torch.tensor(2.5),
    "codes": torch.arange(11, dtype=torch.uint8),
}
SPECS = [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in TENSORS.items()]


def write_all(writer: ShardWriter, limit: int | None = None) -> None:
    for spec in writer.pending[:limit]:
        writer.write(spec.name, TENSORS[spec.name])


def read_all(directory) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_complete(directory):
    found = read_all(directory)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert [path.name for path in directory.glob(".*")] == [".shards.jsonl"]


def test_one_shard_is_a_plain_file(tmp_path):
    with ShardWriter(tmp_path, SPECS, "test") as writer:
        write_all(writer)
    assert_complete(tmp_path)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_have_at_most_the_given_size_and_an_index(tmp_path):
    with ShardWriter(tmp_path, SPECS, "test", max_shard_bytes=100) as writer:
        write_all(writer)
    assert_complete(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in SPECS)
    assert index["weight_map"]["embed"] == "model-00001-of-00002.safetensors"
    assert sorted(SafetensorsCheckpoint.open(tmp_path).names) == sorted(TENSORS)


def test_a_tensor_can_be_written_in_chunks_of_rows(tmp_path):
    spec = SPECS[0]
    with ShardWriter(tmp_path, [spec], "test") as writer:
        writer.write("embed", TENSORS["embed"].split(3))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["embed"], TENSORS["embed"])


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
@pytest.mark.parametrize("max_shard_bytes", [100, 10**6])
def test_writing_continues_after_the_last_complete_tensor(tmp_path, limit, max_shard_bytes):
    with (
        pytest.raises(KeyboardInterrupt),
        ShardWriter(tmp_path, SPECS, "test", max_shard_bytes) as writer,
    ):
        write_all(writer, limit)
        name = writer.pending[0].name
        writer.write(name, interrupted(TENSORS[name]))
    again = ShardWriter(tmp_path, SPECS, "test", max_shard_bytes)
    assert len(again.pending) == len(SPECS) - limit
    with again:
        write_all(again)
    assert_complete(tmp_path)


def test_a_shard_is_synced_before_its_rename_and_the_directory_after_it(tmp_path, monkeypatch):
    calls = record_disk_calls(monkeypatch, tmp_path)
    with ShardWriter(tmp_path, SPECS, "test", max_shard_bytes=300) as writer:
        write_all(writer)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index, journal = "model.safetensors.index.json", ".shards.jsonl"
    size = {path.name: f"({path.stat().st_size} bytes)" for path in tmp_path.iterdir()}
    assert calls[1:] == [
        f"rename .{journal}.writing -> {journal}",
        "sync .",
        f"sync .{first}.writing {size[first]}",
        f"rename .{first}.writing -> {first}",
        "sync .",
        f"sync .{second}.writing {size[second]}",
        f"rename .{second}.writing -> {second}",
        "sync .",
        f"sync .{index}.writing {size[index]}",
        f"rename .{index}.writing -> {index}",
        "sync .",
    ]
    assert calls[0].startswith(f"sync .{journal}.writing (")


def interrupted(tensor):
    yield tensor.flatten()[:-1]
    raise KeyboardInterrupt


def test_another_identity_starts_from_scratch(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, SPECS, "one", 100) as writer:
        write_all(writer, 4)
        raise KeyboardInterrupt
    writer = ShardWriter(tmp_path, SPECS, "another", 100)
    assert len(writer.pending) == len(SPECS)
    with writer:
        write_all(writer)
    assert_complete(tmp_path)


def test_weights_of_others_are_not_overwritten(tmp_path):
    save_tensors(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match="already holds weights"):
        ShardWriter(tmp_path, SPECS, "test")


def test_the_same_call_on_finished_weights_writes_nothing(tmp_path):
    for _ in range(2):
        with ShardWriter(tmp_path, SPECS, "test", 100) as writer:
            write_all(writer)
    assert writer.pending == []
    assert_complete(tmp_path)


def _write_and_die(directory, name, call):
    """Write all tensors; at the given call of a function of `os` the process kills itself."""
    function, calls = getattr(os, name), 0

    def deadly(*arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)

    setattr(os, name, deadly)
    with ShardWriter(directory, SPECS, "test", 300) as writer:
        write_all(writer)


KILLS = [("fsync", n) for n in (1, 2, 3, 5, 7)] + [("replace", n) for n in (1, 2, 3, 4)]
"""Of the journal, the directory, each shard (synced, then renamed) and the index."""


@pytest.mark.parametrize(("name", "call"), KILLS)
def test_no_shard_is_lost_by_a_kill_before_a_sync_or_a_rename(tmp_path, name, call):
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_write_and_die, args=(tmp_path, name, call))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    complete = [path for path in tmp_path.glob(".model*") if path.suffix == ".writing"]
    with ShardWriter(tmp_path, SPECS, "test", 300) as writer:
        if complete and name == "replace":
            assert len(writer.pending) < len(SPECS)
        write_all(writer)
    assert_complete(tmp_path)
    assert set(writer.hashes) == {path.name for path in tmp_path.glob("model-*.safetensors")}


@pytest.mark.parametrize("shard", ["model-00001-of-00002", "model-00002-of-00002"])
def test_tensors_whose_bytes_changed_are_written_again(tmp_path, shard):
    with ShardWriter(tmp_path, SPECS, "test", 300) as writer:
        write_all(writer)
    flip_bit(tmp_path / f"{shard}.safetensors", -1)
    with ShardWriter(tmp_path, SPECS, "test", 300) as writer:
        assert len(writer.pending) == 1
        write_all(writer)
    assert_complete(tmp_path)


def test_a_file_that_lacks_what_was_written_is_an_error(tmp_path, monkeypatch):
    with (
        pytest.raises(ExportError, match="does not hold what was written"),
        ShardWriter(tmp_path, SPECS, "test") as writer,
    ):
        write_all(writer)
        flip_bit(tmp_path / "model.safetensors", 400)


def test_a_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors({"a": torch.zeros(2, 3).T}, tmp_path / "a.safetensors")
    finally:
        assert os.umask(before) == 0o027
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.zeros(3, 2))


def test_too_little_space_is_reported_before_the_first_byte(tmp_path):
    huge = TensorSpec("huge", torch.float32, (2**30, 2**20))
    with pytest.raises(RunError, match=r"the model's weights needs .* are free"):
        ShardWriter(tmp_path, [huge], "test")


def test_a_full_disk_is_an_export_error(tmp_path):
    def full():
        yield TENSORS["embed"][:2]
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(ExportError, match="the disk is full"),
        ShardWriter(tmp_path, SPECS, "test") as writer,
    ):
        writer.write("embed", full())
