"""Slices of every type against gguf, reordering, threads, memory, and a real model."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.gguf import types
from qlora_lite.shards.gguf.checkpoint import GgufCheckpoint, TensorSource
from qlora_lite.shards.gguf.header import read_header
from qlora_lite.shards.gguf.types import FLOATS, SUPPORTED
from tests.gguf_files import oracle, pack, write_gguf

QUICK = tuple(kind for kind in SUPPORTED if not kind.startswith(("IQ1", "IQ2", "IQ3")))
"""libgguf needs seconds to build the tables with which it packs the others."""


def open_gguf(path, **sources) -> GgufCheckpoint:
    """Names as in the file, but for `sources`."""
    header = read_header(path)
    return GgufCheckpoint(header, {name: TensorSource(name) for name in header.tensors} | sources)


def write_one(tmp_path, kind, *shape) -> tuple[Path, torch.Tensor]:
    """A file with a tensor `w`, and its values: in fp32, or in the dtype of the file."""
    torch.manual_seed(0)
    packed = pack(kind, torch.randn(shape))
    return write_gguf(tmp_path / "m.gguf", {"w": packed}), oracle(*packed).to(
        FLOATS.get(kind, torch.float32)
    )


def assert_equal(tensor, expected):
    assert tensor.dtype == expected.dtype
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    "kind",
    [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in SUPPORTED],
)
@pytest.mark.parametrize("native", [True, False], ids=["libgguf", "gguf"])
def test_every_type_is_read_whole_and_in_slices(tmp_path, kind, native, monkeypatch):
    if not native:
        monkeypatch.setattr(types, "NATIVE", None)
    path, expected = write_one(tmp_path, kind, 5, 512)
    checkpoint = open_gguf(path)
    info = checkpoint.info("w")
    assert (info.name, info.dtype, info.shape, info.file) == ("w", expected.dtype, (5, 512), path)
    assert info.num_bytes == checkpoint.num_bytes == expected.nbytes
    assert_equal(checkpoint.read("w"), expected)
    for start, stop in ((0, 2), (3, 5), (4, 9), (2, 2), (4, 1)):
        assert_equal(checkpoint.rows("w", start, stop), expected[start:stop])
        assert checkpoint.rows("w", start, stop).is_contiguous()
    for start, stop in ((0, 512), (256, 512), (31, 33), (300, 700), (7, 7)):
        assert_equal(checkpoint.columns("w", start, stop), expected[:, start:stop])


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_K"])
def test_rows_come_in_the_order_that_is_asked_for(tmp_path, kind):
    path, stored = write_one(tmp_path, kind, 8, 256)
    order = torch.randperm(8)
    checkpoint, expected = open_gguf(path, w=TensorSource("w", row_order=order)), stored[order]
    assert_equal(checkpoint.read("w"), expected)
    assert_equal(checkpoint.rows("w", 3, 7), expected[3:7])
    assert_equal(checkpoint.columns("w", 30, 70), expected[:, 30:70])


@pytest.mark.parametrize("kind", ["F32", "F16", "Q5_0", "Q6_K"])
def test_a_transposed_matrix_is_the_transpose(tmp_path, kind):
    path, stored = write_one(tmp_path, kind, 6, 256)
    checkpoint, expected = open_gguf(path, w=TensorSource("w", transposed=True)), stored.T
    assert checkpoint.info("w").shape == (256, 6)
    assert_equal(checkpoint.read("w"), expected)
    assert_equal(checkpoint.rows("w", 30, 70), expected[30:70])
    assert checkpoint.rows("w", 30, 70).is_contiguous()
    assert_equal(checkpoint.columns("w", 2, 5), expected[:, 2:5])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0"])
def test_a_number_is_added_in_fp32_and_not_to_the_file(tmp_path, kind, transposed):
    path, stored = write_one(tmp_path, kind, 4, 32)
    source = TensorSource("w", add=-1.0, transposed=transposed)
    checkpoint = open_gguf(path, w=source)
    expected = (stored.T if transposed else stored).float() - 1
    for _ in range(2):
        assert_equal(checkpoint.read("w"), expected)
        assert_equal(checkpoint.columns("w", 1, 3), expected[:, 1:3])
    assert checkpoint.info("w").dtype == torch.float32
    assert_equal(open_gguf(path).read("w"), stored)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_vectors_are_sliced_and_reordered_by_element(tmp_path, kind):
    path, stored = write_one(tmp_path, kind, 64)
    order = torch.randperm(64)
    checkpoint = open_gguf(path, v=TensorSource("w", row_order=order))
    assert_equal(checkpoint.rows("w", 5, 40), stored[5:40])
    assert_equal(checkpoint.rows("v", 5, 40), stored[order][5:40])
    assert_equal(checkpoint.read("v"), stored[order])


@pytest.mark.parametrize("kind", ["F16", "Q4_1"])
def test_stacked_matrices_are_sliced_along_the_first_axis(tmp_path, kind):
    path, stored = write_one(tmp_path, kind, 4, 3, 64)
    order = torch.tensor([2, 0, 3, 1])
    checkpoint = open_gguf(path, v=TensorSource("w", row_order=order))
    assert_equal(checkpoint.rows("w", 1, 3), stored[1:3])
    assert_equal(checkpoint.rows("v", 1, 3), stored[order][1:3])
    assert_equal(checkpoint.columns("v", 1, 3), stored[order][:, 1:3])


def test_a_shape_may_have_more_axes_than_the_stored_one(tmp_path):
    path, stored = write_one(tmp_path, "F32", 6, 4)
    checkpoint = open_gguf(path, w=TensorSource("w", shape=(6, 1, 4)))
    assert checkpoint.info("w").shape == (6, 1, 4)
    assert_equal(checkpoint.read("w"), stored[:, None])
    assert_equal(checkpoint.rows("w", 2, 4), stored[2:4, None])
    assert_equal(checkpoint.columns("w", 0, 1), stored[:, None][:, 0:1])


def test_a_large_tensor_is_dequantised_in_several_steps(tmp_path):
    path, stored = write_one(tmp_path, "Q8_0", 2000, 512)
    order = torch.randperm(2000)
    checkpoint = open_gguf(
        path, v=TensorSource("w", row_order=order), t=TensorSource("w", transposed=True)
    )
    assert_equal(checkpoint.read("w"), stored)
    assert_equal(checkpoint.read("v"), stored[order])
    assert_equal(checkpoint.read("t"), stored.T)
    assert_equal(checkpoint.rows("t", 100, 501), stored.T[100:501])


@pytest.mark.parametrize(
    "source",
    [
        TensorSource("elsewhere"),
        TensorSource("w", row_order=torch.arange(4)),
        TensorSource("w", shape=(5, 33)),
        TensorSource("w", shape=(1, 5, 32)),
        TensorSource("v", transposed=True),
    ],
)
def test_a_source_that_does_not_fit_is_refused(tmp_path, source):
    stored = {"w": pack("F32", torch.ones(5, 32)), "v": pack("F32", torch.ones(5))}
    path = write_gguf(tmp_path / "m.gguf", stored)
    with pytest.raises(BaseModelError, match="use another file of this model"):
        open_gguf(path, x=source)


def test_an_unknown_tensor_is_named(tmp_path):
    path, _ = write_one(tmp_path, "F32", 2, 2)
    checkpoint = open_gguf(path)
    assert "w" in checkpoint
    assert "nowhere" not in checkpoint
    for read in (checkpoint.info, checkpoint.read, lambda name: checkpoint.rows(name, 0, 1)):
        with pytest.raises(BaseModelError, match="no tensor 'nowhere'"):
            read("nowhere")


def test_names_come_in_the_order_of_their_bytes_file_by_file(tmp_path):
    stored = {name: pack("F32", torch.ones(4)) for name in "dbca"}
    path = write_gguf(tmp_path / "m.gguf", stored, split_max_tensors=2)
    header = read_header(path)
    checkpoint = GgufCheckpoint(header, {name.upper(): TensorSource(name) for name in "abcd"})
    assert checkpoint.names == ["D", "B", "C", "A"]
    assert [checkpoint.info(name).file.name[:7] for name in "DBCA"] == [
        "m-00001", "m-00001", "m-00002", "m-00002",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_views_of_the_map(tmp_path, kind, recwarn):
    path, _ = write_one(tmp_path, kind, 6, 32)
    checkpoint = open_gguf(path)
    pointer, item = checkpoint.read("w").data_ptr(), FLOATS[kind].itemsize
    assert checkpoint.rows("w", 2, 4).data_ptr() == pointer + 2 * 32 * item
    assert not recwarn.list


def test_a_view_outlives_close_and_what_is_written_to_it_stays_out_of_the_file(tmp_path):
    path, stored = write_one(tmp_path, "F32", 6, 32)
    before, checkpoint = path.read_bytes(), open_gguf(path)
    view = checkpoint.read("w")
    checkpoint.close()
    assert_equal(view, stored)
    view.zero_()
    assert path.read_bytes() == before
    assert_equal(checkpoint.read("w"), stored)


def test_close_releases_the_maps(tmp_path):
    path, _ = write_one(tmp_path, "Q8_0", 6, 32)
    checkpoint = open_gguf(path)
    checkpoint.read("w")
    assert str(path) in Path("/proc/self/maps").read_text()
    checkpoint.close()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_may_be_larger_than_memory(tmp_path):
    path, stored = write_one(tmp_path, "F32", 6, 32)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    os.truncate(path, 4 * memory)  # the file has a hole
    assert_equal(open_gguf(path).read("w"), stored)


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    path, _ = write_one(tmp_path, "Q8_0", 6, 32)
    checkpoint = open_gguf(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="became shorter"):
        checkpoint.read("w")
    checkpoint.close()
    path.unlink()
    with pytest.raises(BaseModelError, match="cannot be read"):
        checkpoint.read("w")


def test_threads_read_the_same(tmp_path):
    path, stored = write_one(tmp_path, "Q4_K", 256, 1024)
    checkpoint, starts = open_gguf(path), range(0, 256, 8)
    for _ in range(5):
        checkpoint.close()
        with ThreadPoolExecutor(8) as pool:
            chunks = list(pool.map(lambda i: checkpoint.rows("w", i, i + 8), starts))
        assert_equal(torch.cat(chunks), stored)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("made", ["as stored", "reordered", "transposed"])
def test_chunks_of_rows_need_the_memory_of_a_chunk(tmp_path, made):
    rows, columns, chunk = 8192, 2048, 256
    packed = pack("Q4_0", torch.randn(256, columns))[1]
    stored = {"w": ("Q4_0", packed.repeat(rows // 256, axis=0))}
    order = torch.randperm(rows) if made == "reordered" else None
    source = TensorSource("w", row_order=order, transposed=made == "transposed")
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", stored), w=source)
    num_rows, width = checkpoint.info("w").shape
    checkpoint.rows("w", 0, chunk)
    before, peak = anonymous_bytes(), 0
    for start in range(0, num_rows, chunk):
        kept = checkpoint.rows("w", start, start + chunk)
        peak = max(peak, anonymous_bytes() - before)
        del kept
    whole = num_rows * width * 4
    assert peak < chunk * width * 4 + 6 * 2**20 < whole / 4


def test_the_fingerprint_depends_on_content_and_name_and_not_on_the_directory(tmp_path):
    def hashes(folder, kind="Q8_0", **metadata):
        (tmp_path / folder).mkdir()
        torch.manual_seed(0)
        stored = {"w": pack(kind, torch.randn(4, 32))}
        checkpoint = open_gguf(write_gguf(tmp_path / folder / "m.gguf", stored, metadata))
        return checkpoint.fingerprint, checkpoint.full_hash

    first = hashes("a")
    assert hashes("b") == first
    assert set(hashes("c", kind="Q4_0")).isdisjoint(first)
    assert set(hashes("d", name="x")).isdisjoint(first)


@pytest.mark.real
def test_a_real_model_is_read_as_gguf_reads_it(real_base):
    checkpoint = open_gguf(real_base)
    for tensor in gguf.GGUFReader(real_base).tensors[::20]:
        expected = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert_equal(checkpoint.read(tensor.name), expected)
