"""Named random streams."""

import torch

from qlora_lite.foundation.seeds import derive, generator


def test_a_stream_depends_only_on_its_name_and_the_seed():
    first = torch.rand(3, generator=generator(0, "adapter", "q_proj"))
    assert torch.equal(first, torch.rand(3, generator=generator(0, "adapter", "q_proj")))
    assert not torch.equal(first, torch.rand(3, generator=generator(0, "adapter", "k_proj")))
    assert not torch.equal(first, torch.rand(3, generator=generator(1, "adapter", "q_proj")))
    assert derive(0, "step", 12) != derive(0, "step", 1, 2)


def test_the_seed_is_the_start_of_a_sha_256():
    """Resuming an old checkpoint needs the same seeds: `printf 0/step/12 | sha256sum`."""
    first_bytes = bytes.fromhex("9f112c47ab5c52f0")
    assert derive(0, "step", 12) == int.from_bytes(first_bytes, "little") >> 1
