"""Read safetensors checkpoints, one tensor or one slice at a time.

    checkpoint = SafetensorsCheckpoint.open(directory)
    for name in checkpoint.names:                  # in the order of the files
        tensor = checkpoint.read(name)

Files are memory-mapped, so reading allocates no anonymous memory. `read`, `rows` and `columns`
return read-only views of the map: copy what you keep. Pickles (`*.bin`) are never opened, because
they can run code.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.files import read_object
from qlora_lite.shards.checkpoint import Checkpoint, TensorInfo
from qlora_lite.shards.fingerprint import sampled_hash

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of a directory with `model.safetensors` or an index of shards."""

    def __init__(self, directory: Path, files: list[Path]) -> None:
        self.directory = directory
        self._open: dict[Path, Any] = {}
        super().__init__(files, (info for file in files for info in self._header(file)))
        if len(files) > 1 or files[0].name != SINGLE:
            self._require_index_matches()

    @classmethod
    def open(cls, directory: Path | str) -> "SafetensorsCheckpoint":
        """Read the headers only.

        Raises:
            BaseModelError: if there is no safetensors file, a shard is missing, or one is damaged.
        """
        directory = Path(directory)
        checkpoint = cls(directory, _shard_files(directory))
        if not checkpoint.names:
            raise BaseModelError(f"{directory} has no tensors. Download it again")
        return checkpoint

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self._file(self.info(name).file).get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor[start:stop]`."""
        return self._file(self.info(name).file).get_slice(name)[start:stop]

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor[:, start:stop]`, not contiguous."""
        return self._file(self.info(name).file).get_slice(name)[:, start:stop]

    def close(self) -> None:
        """Release the memory maps; the next read opens them again."""
        self._open.clear()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, headers and 64 evenly spaced samples: quick for any size."""
        headers = []
        for file in self.files:
            with open(file, "rb") as handle:
                headers.append((file, 8, 8 + int.from_bytes(handle.read(8), "little")))
        return sampled_hash(headers)

    def _require_index_matches(self) -> None:
        """Check that each file has the tensors that the index expects there.

        Raises:
            BaseModelError: naming a tensor that is not there.
        """
        index = self.directory / INDEX
        for name, file in _weight_map(index).items():
            if name not in self._infos or self._infos[name].file.name != file:
                raise BaseModelError(
                    f"{self.directory / file} has no tensor {name!r}, which {INDEX} expects there. "
                    "Download both again"
                )

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise BaseModelError(
                    f"{path} is damaged or not a safetensors file ({error}). Download it again"
                ) from None
        return self._open[path]

    def _header(self, path: Path) -> list[TensorInfo]:
        file = self._file(path)
        infos = []
        for name in file.offset_keys():
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise BaseModelError(
                    f"{path}: tensor {name!r} has the dtype {tensor.get_dtype()}. Supported are "
                    f"{', '.join(DTYPES)}. Use another version of this checkpoint"
                )
            dtype, shape = DTYPES[tensor.get_dtype()], tuple(tensor.get_shape())
            num_bytes = torch.Size(shape).numel() * dtype.itemsize
            infos.append(TensorInfo(name, dtype, shape, num_bytes, path))
        return infos


def _shard_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        files = [directory / name for name in sorted(set(_weight_map(directory / INDEX).values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise BaseModelError(
                f"{directory} has no {', '.join(missing)}, named in its {INDEX}. "
                "The download is incomplete: repeat it"
            )
        return files
    if pickles := sorted(path.name for path in directory.glob("*.bin")):
        raise BaseModelError(
            f"{directory} holds its weights as a pickle ({pickles[0]}), which can run code when it "
            "is read. safetensors is needed: use a revision that has it, or, if you trust the "
            "source, convert it with transformers (from_pretrained, then save_pretrained)"
        )
    raise BaseModelError(
        f"{directory} has neither {SINGLE} nor {INDEX}. "
        "Give the directory of a complete model, or its hub id"
    )


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by an index; files must be next to it.

    Links are followed: the hub's cache consists of links.

    Raises:
        BaseModelError: if the index is damaged, or names a file outside of its folder.
    """
    try:
        weight_map = read_object(index, "weight_map")["weight_map"]
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{index} is damaged ({error}). Download it again") from None
    found: dict[str, str] = weight_map if isinstance(weight_map, dict) else {}
    if not found or not all(isinstance(name, str) for name in found.values()):
        raise BaseModelError(
            f"{index} is damaged: weight_map must map every tensor to the name of its file. "
            "Download it again"
        )
    for name in found.values():
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise BaseModelError(
                f"{index} names the file {name!r}, and only safetensors files in its own folder "
                "are read. Use a checkpoint saved by transformers"
            )
    return found
