"""Read the metadata of a GGUF file so that no key is overlooked.

keys = ArchitectureKeys(header)
keys.integer("block_count")          # llama.block_count of a Llama file
keys.require_all_read()              # raises if a key was not read

A key that nobody reads may change what the model computes. Keys that only describe the file, its
tokenizer or its splits are listed in `DESCRIPTIVE`.
"""

from typing import Any

import numpy as np

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.shards.gguf.header import GgufHeader

DESCRIPTIVE = ("general.", "tokenizer.", "split.", "quantize.", "mradermacher.")
"""Prefixes of keys that do not bear on the config."""


class ArchitectureKeys:
    """The metadata of one architecture, with a record of what was read."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        name = self._name(key)
        return name in self.header.metadata or name in self.header.array_lengths

    def integer(self, key: str, default: int | None = None) -> int:
        """A count or a size of at least 1.

        Raises:
            BaseModelError: if it has another value, or is absent and there is no default.
        """
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise self.wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, a float as its shortest decimal.

        Raises:
            BaseModelError: if it has another type, is not finite, or is absent without a default.
        """
        value = self._get(key, default)
        if type(value) not in (int, float) or not np.isfinite(value):
            raise self.wrong(key, value, "a finite number")
        return shortest_decimal(value) if type(value) is float else value

    def positive(self, key: str, default: float | None = None) -> float:
        """As `number`; it must be above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, value, "a positive number")
        return value

    def text(self, key: str, default: str) -> str:
        """Raises BaseModelError if it is no text."""
        value = self._get(key, default)
        if type(value) is not str:
            raise self.wrong(key, value, "a text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Raises BaseModelError if it is neither true nor false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, value, "true or false")
        return value

    def is_array(self, key: str) -> bool:
        return self._name(key) in self.header.array_lengths

    def per_layer(self, key: str, num_layers: int) -> list[Any]:
        """An array with one value per layer.

        Raises:
            BaseModelError: if it has another length, or is absent.
        """
        name = self._name(key)
        self._read.add(name)
        length = self.header.array_lengths.get(name)
        if length != num_layers:
            found = f"an array of {length}" if length else self.header.metadata.get(name)
            raise self.wrong(key, found, f"an array of {num_layers}, one value per layer,")
        return self.header.array(name)

    def require(self, key: str, expected: object) -> None:
        """Check a key that has one possible value, if it is there.

        Raises:
            BaseModelError: if it has another.
        """
        value = self._get(key, expected)
        if value != expected:
            raise self.wrong(key, value, repr(expected))

    def require_all_read(self) -> None:
        """Raises BaseModelError naming a key that was not read."""
        for name in (*self.header.metadata, *self.header.array_lengths):
            if name not in self._read and not name.startswith(DESCRIPTIVE):
                raise BaseModelError(
                    f"{self.header.files[0]} has the key {name!r}, which is not known for the "
                    f"architecture {self.header.architecture!r}, so the model might compute "
                    "something else. Use the safetensors version of this model"
                )

    def wrong(self, key: str, value: object, needed: str) -> BaseModelError:
        """The error for a value that cannot be used."""
        found = "is missing" if value is None else f"is {str(value)[:60]}"
        return BaseModelError(
            f"{self.header.files[0]}: {self._name(key)} {found}, and {needed} is needed. "
            "Download the file again, or use the safetensors version of this model"
        )

    def _name(self, key: str) -> str:
        return f"{self.header.architecture}.{key}"

    def _get(self, key: str, default: Any) -> Any:
        """A scalar, or the one value that all elements of an array have."""
        name = self._name(key)
        self._read.add(name)
        if name not in self.header.array_lengths:
            return self.header.metadata.get(name, default)
        values = self.header.array(name)
        if len(set(values)) != 1:
            raise self.wrong(key, f"{values[:4]} ...", "the same value for all layers")
        return values[0]


def shortest_decimal(value: float) -> float:
    """The shortest decimal that rounds to a 32-bit float, so that 1e-5 from a file is 1e-5."""
    return float(str(np.float32(value)))
