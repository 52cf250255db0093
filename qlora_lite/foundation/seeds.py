"""Named random streams: each consumer gets its own generator, from the run's seed and its name.

The initial weights of a layer, a dropout mask or the order of an epoch then do not change when
other code draws more or fewer numbers.
"""

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the consumer `names`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A generator for the consumer `names`. On the CPU, so that every machine draws the same."""
    return torch.Generator("cpu").manual_seed(derive(seed, *names))
