"""Headers against libgguf, splits, and what is refused."""

import re
import resource
import struct
import time

import libgguf
import pytest
import torch

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.gguf.checkpoint import GgufCheckpoint, TensorSource
from qlora_lite.shards.gguf.header import find_gguf, read_header
from tests.gguf_files import pack, write_gguf

METADATA = {
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": True,
    "general.name": "Größe",
    "tokenizer.ggml.tokens": ["<s>", "Ü", "", "b"],
    "tokenizer.ggml.scores": [0.0, -1.5, 2.0, 3.0],
    "tokenizer.ggml.token_type": [1, 2, 3, 4],
    "some.flags": [True, False],
}


def tensors():
    torch.manual_seed(0)
    return {
        "token_embd.weight": pack("Q8_0", torch.randn(6, 32)),
        "blk.0.attn_q.weight": pack("Q4_K", torch.randn(4, 256)),
        "output_norm.weight": pack("F32", torch.randn(32)),
    }


def test_a_header_is_read_as_libgguf_reads_it(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tensors(), METADATA)
    header, expected = read_header(path), libgguf.inspect_gguf(path)
    assert header.files == (path,)
    assert header.architecture == "llama"
    arrays = {key for key, value in expected.metadata.items() if value.value_type == "ARRAY"}
    assert set(header.array_lengths) == arrays
    for key, value in expected.metadata.items():
        if key in arrays:
            assert header.array_lengths[key] == value.length
            assert header.array(key) == value.value
        else:
            assert header.metadata[key] == value.value
            assert type(header.metadata[key]) is type(value.value)
    assert [(t.name, t.shape, t.kind, t.offset, t.num_bytes) for t in header.tensors.values()] == [
        (t.name, t.shape[::-1], t.qtype, t.data_offset, t.nbytes) for t in expected.tensors
    ]
    assert header.data_starts == (expected.data_offset,)


def test_another_alignment_is_followed(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tensors(), {"general.alignment": 256})
    assert [t.offset % 256 for t in read_header(path).tensors.values()] == [0, 0, 0]


@pytest.mark.parametrize("small_first", [False, True])
def test_any_split_gives_the_whole_model(tmp_path, small_first):
    options = {"split_max_tensors": 1, "small_first_shard": small_first}
    write_gguf(tmp_path / "m.gguf", tensors(), METADATA, **options)
    files = tuple(sorted(tmp_path.iterdir()))
    assert len(files) == 4 if small_first else 3
    for path in (*files, tmp_path):
        header = read_header(path)
        assert header.files == files
        assert sorted(header.tensors) == sorted(tensors())
        assert header.array("tokenizer.ggml.scores") == METADATA["tokenizer.ggml.scores"]


def test_a_missing_split_is_named(tmp_path):
    first = write_gguf(tmp_path / "m.gguf", tensors(), split_max_tensors=1)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(BaseModelError, match=r"has no m-00002-of-00003\.gguf"):
        read_header(first)


def test_a_split_of_another_model_is_refused(tmp_path):
    for name, count in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        write_gguf(tmp_path / name / "m.gguf", tensors(), split_max_tensors=count)
    first = tmp_path / "a" / "m-00001-of-00003.gguf"
    (tmp_path / "b" / "m-00002-of-00002.gguf").rename(tmp_path / "a" / "m-00002-of-00003.gguf")
    with pytest.raises(
        BaseModelError, match=r"m-00002-of-00003\.gguf says that it is part 1 .* of 2"
    ):
        read_header(first)


def test_a_renamed_split_is_refused(tmp_path):
    first = write_gguf(tmp_path / "m.gguf", tensors(), split_max_tensors=1)
    with pytest.raises(BaseModelError, match=r"part 0 \(from 0\) of 3 .* as part 0 of 1"):
        read_header(first.rename(tmp_path / "m.gguf"))


def test_a_tensor_in_two_splits_is_refused(tmp_path):
    first = write_gguf(tmp_path / "m.gguf", tensors(), split_max_tensors=1)
    second, third = (tmp_path / f"m-0000{i}-of-00003.gguf" for i in (2, 3))
    number = struct.pack("<H", 1)
    content = second.read_bytes()
    key = content.index(b"split.no") + len(b"split.no") + 4
    assert content[key : key + 2] == number
    third.write_bytes(content[:key] + struct.pack("<H", 2) + content[key + 2 :])
    with pytest.raises(BaseModelError, match=r"repeats the tensor 'blk\.0\.attn_q\.weight'"):
        read_header(first)


def test_what_is_a_base_in_gguf(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tensors())
    assert find_gguf(path) == path
    assert find_gguf(tmp_path) == path
    assert find_gguf(tmp_path / "nothing.gguf") is None
    assert find_gguf(tmp_path / "a\0b.gguf") is None
    blob = path.rename(tmp_path / "sha256-0123")
    assert find_gguf(blob) == blob
    assert find_gguf(tmp_path) is None
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "notes.txt").write_text("GG")
    assert find_gguf(tmp_path) is None
    assert find_gguf(tmp_path / "notes.txt") is None


def test_a_folder_with_safetensors_is_another_base(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tensors())
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) == path
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_gguf(tmp_path) is None
    (tmp_path / "config.json").unlink()
    assert find_gguf(tmp_path) == path


def test_several_models_in_a_folder_are_named(tmp_path):
    write_gguf(tmp_path / "a.gguf", tensors())
    write_gguf(tmp_path / "b.gguf", tensors(), split_max_tensors=1)
    with pytest.raises(BaseModelError, match=r"2 GGUF models \(a\.gguf, b-00001-of-00003\.gguf\)"):
        find_gguf(tmp_path)


def test_upper_case_names_are_the_same_files(tmp_path):
    write_gguf(tmp_path / "m.gguf", tensors(), split_max_tensors=1)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_suffix(".GGUF"))
    (tmp_path / "MMPROJ-m.gguf").write_bytes(b"")
    first = tmp_path / "m-00001-of-00003.GGUF"
    assert find_gguf(tmp_path) == first
    assert set(read_header(first).tensors) == set(tensors())


def test_an_array_that_is_not_there_is_named(tmp_path):
    header = read_header(write_gguf(tmp_path / "m.gguf", tensors()))
    with pytest.raises(BaseModelError, match=r"no array 'tokenizer\.ggml\.tokens'"):
        header.array("tokenizer.ggml.tokens")


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name=b"a", shape=(32,), kind=0, offset=0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


ENTRY = tensor()
ARCHITECTURE = key(b"general.architecture", 8, text(b"llama"))


def raw(keys=(ARCHITECTURE,), entries=(ENTRY,), *, magic=b"GGUF", version=3, counts=None):
    num_tensors, num_keys = counts or (len(entries), len(keys))
    header = magic + struct.pack("<IQQ", version, num_tensors, num_keys)
    content = header + b"".join(keys) + b"".join(entries)
    return content + bytes(-len(content) % 32) + bytes(256)


def test_the_bytes_that_are_damaged_below_are_a_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(raw())
    assert read_header(tmp_path / "m.gguf").tensors["a"].num_bytes == 128


DAMAGES = {
    "another format": (raw(magic=b"ggjt"), "is not a GGUF file"),
    "nothing": (b"", "is empty"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "a page": (b"<!DOCTYPE html>", "is not a GGUF file"),
    "only the magic": (b"GGUF", "damaged: it ends inside"),
    "version 1": (raw(version=1), "of version 1, .* convert it again"),
    "version 4": (raw(version=4), "of version 4"),
    "big-endian": (raw(version=3 << 24), "is big-endian"),
    "2^60 tensors": (raw(counts=(2**60, 1)), "claims 1,152,921,504,606,846,976 tensors"),
    "2^60 keys": (raw(counts=(1, 2**60)), "damaged"),
    "more tensors than there are": (raw(counts=(2, 1)), "0 dimensions"),
    "an endless string": (raw([text(b"x")[:7] + b"\xff" + b"x"]), "a length in its header"),
    "an endless array": (raw([key(b"x", 9, struct.pack("<IQ", 4, 2**62))]), "a length"),
    "an endless array of strings": (
        raw([key(b"x", 9, struct.pack("<IQ", 8, 2**62))]),
        "a length",
    ),
    "an array of arrays": (raw([key(b"x", 9, struct.pack("<IQ", 9, 1))]), "unknown type 9"),
    "a value of no type": (raw([key(b"x", 13, b"")]), "unknown type 13"),
    "a key twice": (raw([ARCHITECTURE, ARCHITECTURE]), "not unique"),
    "a key without a name": (raw([key(b"", 0, b"\1")]), "is empty"),
    "a key that is no text": (raw([key(b"\xff", 0, b"\1")]), "not UTF-8"),
    "no architecture": (raw([key(b"x", 0, b"\1")]), "does not say its architecture"),
    "an architecture that is a number": (
        raw([key(b"general.architecture", 0, b"\1")]),
        "does not say its architecture",
    ),
    "alignment of 0": (
        raw([ARCHITECTURE, key(b"general.alignment", 4, bytes(4))]),
        "general.alignment is 0",
    ),
    "alignment of 12": (
        raw([ARCHITECTURE, key(b"general.alignment", 4, struct.pack("<I", 12))]),
        "general.alignment is 12",
    ),
    "alignment that is text": (
        raw([ARCHITECTURE, key(b"general.alignment", 8, text(b"32"))]),
        "general.alignment is '32'",
    ),
    "no tensors": (raw(entries=()), "vocabulary-only"),
    "a tensor of no dimension": (raw(entries=[tensor(shape=())]), "0 dimensions"),
    "a tensor of five dimensions": (raw(entries=[tensor(shape=(1,) * 5)]), "5 dimensions"),
    "an empty tensor": (raw(entries=[tensor(shape=(32, 0))]), r"the shape \(0, 32\)"),
    "a tensor without a name": (raw(entries=[tensor(name=b"")]), "the tensor ''"),
    "a tensor twice": (raw(entries=[tensor(), tensor(offset=128)]), "two tensors 'a'"),
    "tensors that overlap": (raw(entries=[tensor(), tensor(b"b", offset=96)]), "overlap"),
    "a gap between tensors": (
        raw(entries=[tensor(), tensor(b"b", offset=160)]),
        "32 bytes are unused between the tensors 'a' of type F32 and 'b'",
    ),
    "a tensor between boundaries": (raw(entries=[tensor(offset=8)]), "the offset 8"),
    "half a block": (raw(entries=[tensor(shape=(16,), kind=2)]), "type Q4_0 has the shape"),
    "an unknown type": (raw(entries=[tensor(kind=99)]), "'a' has the type number 99.*Q4_K"),
    "a type of no weights": (raw(entries=[tensor(kind=26)]), "'a' has the type I32"),
    "a tensor behind the end": (
        raw(entries=[tensor(shape=(65,))]),
        "a ends at byte 388, and the file at 384",
    ),
    "a huge tensor": (raw(entries=[tensor(shape=(2**62, 2**62))]), "a ends at byte"),
    "a huge offset": (raw(entries=[tensor(offset=2**63)]), "a ends at byte"),
}


def test_a_header_of_more_than_256_mib_is_refused(tmp_path):
    path, length = tmp_path / "m.gguf", 2**28
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    head += text(b"x") + struct.pack("<IIQ", 9, 0, length)
    path.write_bytes(head)
    with open(path, "ab") as file:
        file.truncate(2 * length)  # sparse: the array of bytes is all there
    with pytest.raises(BaseModelError, match="ends inside"):
        read_header(path)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_error_that_names_the_file(tmp_path, name):
    content, message = DAMAGES[name]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(BaseModelError, match=message) as error:
        read_header(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(error.value)
    assert re.search("[Dd]ownload it again|Use another file|Give a|Run `git lfs", str(error.value))


def read_everything(path) -> None:
    header = read_header(path)
    for key in header.array_lengths:
        header.array(key)
    checkpoint = GgufCheckpoint(header, {name: TensorSource(name) for name in header.tensors})
    for name in checkpoint.names:
        checkpoint.read(name)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tensors(), METADATA)
    content, header = path.read_bytes(), read_header(path)
    (data,), last = header.data_starts, header.tensors["output_norm.weight"]
    for size in (*range(data), *range(data, last.offset + last.num_bytes, 16)):
        path.write_bytes(content[:size])
        with pytest.raises(BaseModelError):
            read_header(path)


def test_a_flipped_bit_in_the_header_is_an_error_or_another_value(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tensors(), METADATA)
    content, stop = path.read_bytes(), read_header(path).data_starts[0]
    peak, start, refused = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic(), 0
    for position in range(stop):
        for bit in (0, 4, 7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                read_everything(path)
            except BaseModelError:
                refused += 1
    assert refused > stop  # of three times as many
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 200 * 1024, f"{grown} KiB"
    assert time.monotonic() - start < 120
