"""Rows of random tokens, of random lengths, with random loss masks."""

import torch

from qlora_lite.data.examples import Examples, ExamplesBuilder
from tests.tiny import VOCABULARY


def random_examples(count: int, longest: int = 40, seed: int = 0) -> Examples:
    rng = torch.Generator().manual_seed(seed)
    builder = ExamplesBuilder()
    for row in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=rng))
        ids = torch.randint(3, VOCABULARY, (length,), generator=rng)
        mask = torch.rand(length, generator=rng) < 0.6
        mask[0], mask[-1] = False, True
        builder.add(ids.tolist(), mask.tolist(), row)
    return builder.build()
