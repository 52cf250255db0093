"""The header of a model in GGUF: one file, or all its splits.

    path = find_gguf(folder)              # None: no GGUF base
    header = read_header(path)
    header.metadata["llama.block_count"], header.array("tokenizer.ggml.tokens")
    header.tensors["blk.0.attn_q.weight"]

Splits are named `model-00001-of-00003.gguf` by llama.cpp. The first one has the metadata.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.files import is_directory, is_file
from qlora_lite.shards.gguf.file import (
    MAGIC,
    GgufFile,
    StoredArray,
    StoredTensor,
    read_array,
    read_file,
)
from qlora_lite.shards.reader import INDEX, SINGLE

_SPLIT = re.compile(
    r"(?P<model>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.(?i:gguf))", re.DOTALL
)


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a model."""

    files: tuple[Path, ...]
    architecture: str
    metadata: Mapping[str, Any]
    """Numbers, booleans and strings."""

    arrays: Mapping[str, StoredArray]
    """Where the arrays of the metadata are, in the first file."""

    tensors: Mapping[str, StoredTensor]
    """By name, file by file, in the order of the headers."""

    data_starts: tuple[int, ...]
    """The bytes of each file's header."""

    @property
    def array_lengths(self) -> dict[str, int]:
        return {key: array.length for key, array in self.arrays.items()}

    def array(self, key: str) -> list[Any]:
        """Read one array of the metadata from the file.

        Raises:
            BaseModelError: if there is no such array, or it cannot be read.
        """
        if key not in self.arrays:
            raise BaseModelError(
                f"{self.files[0]} has no array {key!r}. The file is incomplete or of another kind: "
                "use another file of this model"
            )
        return read_array(self.files[0], key, self.arrays[key])


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means; None if it means another kind of base, or nothing.

    A file needs the suffix .gguf or the first bytes of GGUF: the models of Ollama have no suffix. A
    folder needs the files of one model; a vision tower next to it (mmproj) does not count. A folder
    with config.json and safetensors is no GGUF base.

    Raises:
        BaseModelError: if a folder has several models, naming them.
    """
    if is_file(path):
        return path if path.suffix.lower() == ".gguf" or _starts_with_magic(path) else None
    if not is_directory(path) or _is_safetensors(path):
        return None
    files = sorted(file for file in path.glob("*") if _is_model(file.name) and file.is_file())
    models: dict[str, Path] = {}
    for file in files:
        models.setdefault(_model_of(file), file)
    if len(models) > 1:
        names = ", ".join(file.name for file in models.values())
        raise BaseModelError(
            f"{path} has {len(models)} GGUF models ({names}). Give the path of one of them"
        )
    return files[0] if files else None


def read_header(path: Path) -> GgufHeader:
    """Read and check the headers of all files of a model.

    Args:
        path: a file, any split of several, or a folder with one model.

    Raises:
        BaseModelError: if a file is missing, damaged or unsupported, the splits do not belong
            together, or there are no tensors.
    """
    found = find_gguf(path)
    if found is None:
        raise BaseModelError(f"{path} is not a GGUF file, nor a folder with one. Give such a path")
    files = [read_file(file) for file in _parts(found)]
    first = files[0]
    _require_splits_match(files)
    architecture = first.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise BaseModelError(
            f"{first.path} does not say its architecture (general.architecture). "
            "Use another file of this model"
        )
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    if not tensors:
        raise BaseModelError(
            f"{first.path} has no tensors: it is a vocabulary-only file. Give a file with weights"
        )
    return GgufHeader(
        tuple(file.path for file in files),
        architecture,
        first.metadata,
        first.arrays,
        tensors,
        tuple(file.data_start for file in files),
    )


def _is_model(name: str) -> bool:
    name = name.lower()
    return name.endswith(".gguf") and not name.startswith(".") and "mmproj" not in name


def _starts_with_magic(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _is_safetensors(folder: Path) -> bool:
    weights = is_file(folder / SINGLE) or is_file(folder / INDEX)
    return weights and is_file(folder / "config.json")


def _model_of(file: Path) -> str:
    """What the names of all splits of a model share."""
    split = _SPLIT.fullmatch(file.name)
    return f"{split['model']} of {split['count']}" if split else file.name


def _parts(file: Path) -> list[Path]:
    """All splits of the model that a file belongs to.

    Raises:
        BaseModelError: naming the missing ones.
    """
    split = _SPLIT.fullmatch(file.name)
    if split is None or not 1 <= int(split["part"]) <= int(split["count"]):
        return [file]
    names = [
        f"{split['model']}-{part:05d}-of-{split['count']}{split['suffix']}"
        for part in range(1, int(split["count"]) + 1)
    ]
    missing = [name for name in names if not is_file(file.with_name(name))]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise BaseModelError(
            f"{file.parent} has no {', '.join(missing[:3])}{more}. {file.name} is a part of a "
            "model: put all parts into the same folder"
        )
    return [file.with_name(name) for name in names]


def _require_splits_match(files: Sequence[GgufFile]) -> None:
    """Compare the files with what each says about the splits.

    Raises:
        BaseModelError: naming a file that does not belong to the others.
    """
    total = sum(len(file.tensors) for file in files)
    for part, file in enumerate(files):
        said = tuple(
            file.metadata.get(f"split.{key}", default)
            for key, default in (("no", part), ("count", 1), ("tensors.count", total))
        )
        if said != (part, len(files), total):
            raise BaseModelError(
                f"{file.path} says that it is part {said[0]} (from 0) of {said[1]} with {said[2]} "
                f"tensors in all, and was found as part {part} of {len(files)} with {total}. "
                "Keep the names that the parts were published with, or download them again"
            )
    names: set[str] = set()
    for file in files:
        for tensor in file.tensors:
            if tensor.name in names:
                raise BaseModelError(
                    f"{file.path} repeats the tensor {tensor.name!r} of another part. "
                    "Download all parts again"
                )
            names.add(tensor.name)
