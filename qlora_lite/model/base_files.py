"""Where the files of a base are on this machine.

    files = locate(Base(model="Qwen/Qwen3-8B"))    # downloads it, if it is not here
    files.directory / "config.json"
    checkpoint = open_checkpoint(files, facts)

A GGUF file has config, tokenizer and generation settings in its own form. They are converted once
into a directory, so that everything else reads the same files for every base. A run keeps that
directory; without a run it is temporary.
"""

import contextlib
import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download

from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.files import complete_directory, is_directory, write_json, write_text
from qlora_lite.foundation.sealed import hashes_of, read_sealed, require_files, write_sealed
from qlora_lite.model.config import require_hub_id, unreachable
from qlora_lite.model.facts import BaseFacts
from qlora_lite.model.gguf.config import config_from_gguf
from qlora_lite.model.gguf.names import tensor_sources
from qlora_lite.model.gguf.tokenizer import stop_ids, tokenizer_from_gguf
from qlora_lite.model.settings import Base
from qlora_lite.shards.checkpoint import Checkpoint
from qlora_lite.shards.gguf.checkpoint import GgufCheckpoint
from qlora_lite.shards.gguf.header import GgufHeader, find_gguf, read_header
from qlora_lite.shards.reader import SafetensorsCheckpoint

_RECORD = "converted.json"
_VERSION = 1
"""Of our conversion: raise it when other files are written from the same GGUF file."""

_LICENCE_KEYS = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
}


@dataclass(frozen=True)
class BaseFiles:
    """Where a base is on this machine."""

    directory: Path
    """With `config.json`, the tokenizer and generation settings."""

    weights: Path
    """The same directory, with its safetensors files; or a GGUF file."""

    @property
    def is_gguf(self) -> bool:
        return self.weights != self.directory

    @classmethod
    def of(cls, directory: Path) -> "BaseFiles":
        """The files of a model directory."""
        return cls(directory, directory)


def locate(base: Base, kept: Path | None = None) -> BaseFiles:
    """Find a base. From the hub, downloads only config, tokenizer and safetensors.

    Args:
        kept: where the converted config and tokenizer of a GGUF file are kept, or will be; a
            temporary directory unless given.

    Raises:
        BaseModelError: if there is no such model, it cannot be downloaded, or it is a GGUF file
            that cannot be converted.
    """
    return files_of(find_weights(base), kept)


def files_of(weights: Path, kept: Path | None = None) -> BaseFiles:
    """What `locate` returns for the result of `find_weights`.

    Raises:
        BaseModelError: if it is a GGUF file that cannot be converted.
    """
    if is_directory(weights):
        return BaseFiles.of(weights)
    return BaseFiles(_converted(weights, kept), weights)


def find_weights(base: Base) -> Path:
    """The directory or GGUF file of a base, downloaded if need be. Converts nothing.

    Raises:
        BaseModelError: if there is no such model, or it cannot be downloaded.
    """
    if (gguf := find_gguf(Path(base.model))) is not None:
        return gguf
    if is_directory(Path(base.model)):
        return Path(base.model)
    require_hub_id(base.model)
    code = ["*.py"] if base.trust_remote_code else []
    try:
        directory = snapshot_download(
            base.model,
            revision=base.revision,
            allow_patterns=["*.json", "model*.safetensors", "*.model", "*.jinja", "*.txt", *code],
            ignore_patterns=["*/*"],
        )
    except OSError as error:
        raise BaseModelError(unreachable(base.model, base.revision, error)) from error
    return Path(directory)


def open_weights(weights: Path) -> Checkpoint:
    """A directory or GGUF file, for its hashes: the tensors of a GGUF file have no names.

    Raises:
        BaseModelError: if a file is missing or damaged.
    """
    if is_directory(weights):
        return SafetensorsCheckpoint.open(weights)
    return GgufCheckpoint(read_header(weights), {})


def open_checkpoint(files: BaseFiles, facts: BaseFacts | None = None) -> Checkpoint:
    """The weights of a base.

    Args:
        facts: of the base. Without them, the tensors of a GGUF file have no names, and only its
            hashes can be read.

    Raises:
        BaseModelError: if a file is missing or damaged, or has other tensors than the model.
    """
    if facts is None or not files.is_gguf:
        return open_weights(files.weights)
    header = read_header(files.weights)
    shapes = {parameter.name: parameter.shape for parameter in facts.shape.parameters}
    return GgufCheckpoint(header, tensor_sources(header, facts.config, shapes))


def _converted(gguf: Path, kept: Path | None) -> Path:
    """The directory with the converted config and tokenizer of a GGUF file."""
    header = read_header(gguf)
    fingerprint = GgufCheckpoint(header, {}).fingerprint
    if kept is None:
        kept = Path(_temporary(fingerprint).name) / "base"
    made_by = {
        "fingerprint": fingerprint,
        "transformers": transformers.__version__,
        "version": _VERSION,
    }
    if not _is_intact(kept, made_by):
        _convert(header, kept, made_by)
    return kept


@functools.cache
def _temporary(fingerprint: str) -> tempfile.TemporaryDirectory[str]:
    """One directory per model and process, deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="qlora_lite_")


def _is_intact(directory: Path, made_by: Mapping[str, Any]) -> bool:
    """Whether a directory was converted from this file and is complete."""
    with contextlib.suppress(OSError, ValueError):
        record = read_sealed(directory / _RECORD)
        require_files(directory, record)
        return record.items() >= made_by.items()
    return False


def _convert(header: GgufHeader, directory: Path, made_by: Mapping[str, Any]) -> None:
    config, tokenizer = config_from_gguf(header), tokenizer_from_gguf(header)
    with complete_directory(directory) as temporary:
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        found = {name: getattr(config, name, None) for name in names} | {
            "eos_token_id": stop_ids(header)
        }
        settings = {name: ids for name, ids in found.items() if ids not in (None, [])}
        write_json(temporary / "generation_config.json", settings)
        if licence := _licence(header):
            write_text(temporary / "README.md", licence)
        written = sorted(path.name for path in temporary.iterdir())
        write_sealed(temporary / _RECORD, made_by, hashes_of(temporary, written))


def _licence(header: GgufHeader) -> str:
    """The licence that the file names, in the form of a model card; empty if it names none."""
    found = {
        name: header.metadata[f"general.{key}"]
        for name, key in _LICENCE_KEYS.items()
        if isinstance(header.metadata.get(f"general.{key}"), str)
    }
    if not found:
        return ""
    lines = [f"{name}: {json.dumps(value)}" for name, value in found.items()]
    return "\n".join(["---", *lines, "---", ""])
