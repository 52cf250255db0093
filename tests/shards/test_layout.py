"""Which tensors go into which shard, and headers that the safetensors library accepts."""

import torch
from safetensors.torch import load

from qlora_lite.shards.layout import Shard, TensorSpec, split_into_shards

SPECS = [
    TensorSpec("codes", torch.uint8, (11,)),
    TensorSpec("norm", torch.bfloat16, (3,)),
    TensorSpec("weight", torch.float32, (5, 7)),
    TensorSpec("scalar", torch.float64, ()),
]


def names(shards: list[Shard]) -> list[list[str]]:
    return [[spec.name for spec in shard.specs] for shard in shards]


def test_a_shard_is_filled_to_the_last_byte_of_its_limit():
    assert names(split_into_shards(SPECS, 165)) == [["scalar", "weight", "norm", "codes"]]
    assert names(split_into_shards(SPECS, 164)) == [["weight", "norm", "codes"], ["scalar"]]


def test_a_tensor_larger_than_the_limit_has_its_own_shard():
    assert names(split_into_shards(SPECS, 20)) == [["norm", "codes"], ["weight"], ["scalar"]]


def test_every_tensor_is_aligned_to_its_dtype():
    (shard,) = split_into_shards(SPECS, 1000)
    starts = [end - spec.num_bytes for spec, end in zip(shard.specs, shard.ends, strict=True)]
    assert all(
        start % spec.dtype.itemsize == 0 for spec, start in zip(shard.specs, starts, strict=True)
    )


def test_the_library_reads_a_header_and_the_data_after_it():
    (shard,) = split_into_shards(SPECS, 1000)
    found = load(shard.header + bytes(range(165)))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in found.items()} == {
        spec.name: (spec.dtype, spec.shape) for spec in SPECS
    }
    assert found["codes"].tolist() == list(range(154, 165))
    assert shard.ends[-1] == len(shard.header) + 165
