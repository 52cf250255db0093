"""Randomness by name: every consumer has a stream of its own that depends on the seed and its name.

A layer's start, a dropout mask or the order of an epoch then does not change when something
else draws a number more or less.
"""

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """A seed of 63 bits for the consumer `names`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the consumer `names`: the same numbers on every device and machine."""
    return torch.Generator("cpu").manual_seed(derive(seed, *names))
