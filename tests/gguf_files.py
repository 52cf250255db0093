"""GGUF files for tests: packed by libgguf, written by gguf."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import torch
from torch import Tensor

Stored = Mapping[str, tuple[str, np.ndarray]]
"""Type and packed rows of each tensor, by its name in the file."""


def pack(kind: str, values: Tensor) -> tuple[str, np.ndarray]:
    """Values (..., columns) in a type of GGUF."""
    return kind, libgguf.quantize_rows(values.float().numpy(), libgguf.GGMLQuantizationType[kind])


def oracle(kind: str, packed: np.ndarray) -> Tensor:
    """What gguf, and with it transformers, makes of packed rows: fp32."""
    if kind in ("F32", "F16"):
        return torch.from_numpy(packed.astype(np.float32))
    dense = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(dense)


def write_gguf(
    path: Path, tensors: Stored, metadata: Mapping[str, Any] | None = None, **options: Any
) -> Path:
    """Write a file, or splits (with `split_max_tensors=...`). Returns the path of the first.

    Args:
        metadata: strings, integers, floats, booleans and lists.
        options: of `gguf.GGUFWriter`.
    """
    writer = gguf.GGUFWriter(path, "llama", **options)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    adders |= {str: writer.add_string, list: writer.add_array}
    for key, value in (metadata or {}).items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        else:
            adders[type(value)](key, value)
    for name, (kind, packed) in tensors.items():
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else sorted(path.parent.glob(f"{path.stem}-*.gguf"))[0]
