"""A model directory that is complete or absent, and what belongs into it beside the weights.

    with unfinished(out, weights.identity) as aside:
        write(weights, aside)
        write_companions(aside, ...)

It grows as a hidden `.name.writing` next to its place and is renamed when all is synced. After a
kill the same command goes on there; what another command left there is removed.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qlora_lite.foundation.errors import ExportError, RunError
from qlora_lite.foundation.files import (
    lock,
    make_folder,
    sync_directory,
    sync_tree,
    write_json,
    write_text,
)

LICENCES = ("licen[cs]e*", "notice*", "use_policy*", "copying*")
"""Files of the base that go with everything made of it, in any case."""

_IDENTITY = ".merge"


def require_free(out: Path) -> None:
    """Refuse a place where something is already, or where nothing can be.

    Raises:
        ExportError: if `out` is a file, or a directory that is not empty.
        RunError: if there cannot be a folder of this name.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise ExportError(
            f"{out} exists already. Nothing is overwritten: give another place, or remove it first"
        )
    make_folder(out.parent)
    if not os.access(out.parent, os.W_OK):
        raise RunError(f"{out.parent} may not be written to. Give another place")


@contextmanager
def unfinished(out: Path, identity: str) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when the block ends well.

    Args:
        identity: a hash of what will be written; work with the same one is continued.

    Raises:
        ExportError: if `out` is taken.
        RunError: if another process writes it.
    """
    require_free(out)
    aside = out.with_name(f".{out.name}.writing")
    make_folder(aside)
    with lock(aside):
        _keep_only(aside, identity)
        yield aside
        sync_tree(aside)
        for path in sorted(aside.glob(".*"), key=lambda path: path.name == _IDENTITY):
            path.unlink()
        sync_directory(aside)
        require_free(out)
        os.replace(aside, out)
        sync_directory(out.parent)


def has_all_weights(directory: Path) -> bool:
    """The weights of an unfinished directory are complete, the rest may be missing."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return any((directory / name).is_file() for name in names)


def _keep_only(aside: Path, identity: str) -> None:
    """Go on with work of this identity; clear anything else."""
    recorded = aside / _IDENTITY
    if recorded.is_file() and recorded.read_text(encoding="utf-8") == identity:
        return
    for path in aside.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
    write_text(recorded, identity)


def write_companions(
    directory: Path,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    is_tied: bool | None,
    end_ids: Sequence[int],
    with_code: bool,
) -> None:
    """Configuration, generation settings, tokenizer with chat template, and licences.

    Args:
        base: the base's directory.
        tokenizer: the one of training.
        dtype: of the weights.
        is_tied: the head shares the embedding; None leaves what the base's config says.
        end_ids: tokens at which generation has to stop.
        with_code: copy the base's own Python code.
    """
    write_json(directory / "config.json", _config(base, dtype, is_tied))
    write_json(directory / "generation_config.json", _generation(base, end_ids))
    tokenizer.save_pretrained(directory)
    for path in sorted(base.iterdir()):
        is_licence = any(fnmatch(path.name.lower(), pattern) for pattern in LICENCES)
        if path.is_file() and (is_licence or (with_code and path.suffix == ".py")):
            shutil.copyfile(path, directory / path.name)


def _config(base: Path, dtype: torch.dtype, is_tied: bool | None) -> dict[str, Any]:
    """The base's own, with what has changed."""
    config = _read(base / "config.json")
    for stale in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(stale, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if is_tied is not None:
        config["tie_word_embeddings"] = is_tied
    return config


def _generation(base: Path, end_ids: Sequence[int]) -> dict[str, Any]:
    """The base's own, if it has one, with every token that ends an answer."""
    path = base / "generation_config.json"
    settings = _read(path) if path.is_file() else {}
    if not settings:
        config = _read(base / "config.json")
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: config[name] for name in names if config.get(name) is not None}
    known = settings.get("eos_token_id")
    known = known if isinstance(known, list) else [known]
    ends = list(dict.fromkeys([*end_ids, *(end for end in known if end is not None)]))
    settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return settings


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
