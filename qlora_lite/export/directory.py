"""A model directory that is complete or absent, and the files in it besides the weights.

    with resumable_directory(out, weights.identity) as temporary:
        hashes = write(weights, temporary)
        write_companions(temporary, ...)
        write_record(temporary, weights.identity, request, {}, hashes)

The files are written to a hidden `.name.writing` next to `out`, which is synced and renamed at the
end. After a kill the same command continues there; what another command left there is removed.
`qlora_lite.json` records what was asked for and the hashes of all files: the same command finds it
in `out` and has nothing left to do.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qlora_lite.data.templates import ChatTemplate
from qlora_lite.foundation.errors import CheckError, ExportError, RunError
from qlora_lite.foundation.files import (
    lock,
    make_folder,
    read_object,
    reporting_full_disk,
    sync_directory,
    sync_tree,
    write_json,
    write_text,
)
from qlora_lite.foundation.sealed import hashes_of, read_sealed, require_files, write_sealed
from qlora_lite.model.config import require_generation_settings

LICENCES = ("licen[cs]e*", "notice*", "use_policy*", "copying*")
"""Files of the base that every derived model must include; matched in lower case."""

RECORD = "qlora_lite.json"
"""What a finished directory was made from."""

_IDENTITY = ".merge"


def require_free(out: Path) -> None:
    """Check that `out` does not exist yet, or is an empty directory, and can be written.

    Raises:
        ExportError: if `out` is a file, a link to nothing, or a directory that is not empty.
        RunError: if there cannot be a folder of this name.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if os.path.lexists(out):
        raise ExportError(
            f"{out} exists already. Nothing is overwritten: give another path, or remove it first"
        )
    make_folder(out.parent)
    if not os.access(out.parent, os.W_OK):
        raise RunError(f"{out.parent} is not writable. Give another path")


@contextmanager
def resumable_directory(out: Path, identity: str) -> Iterator[Path]:
    """A directory to fill, which is renamed to `out` if the block does not raise.

    A `CheckError` in the block deletes what was written.

    Args:
        identity: a hash of what will be written; earlier work with the same one is continued.

    Raises:
        ExportError: if `out` exists.
        RunError: if another process is writing it.
    """
    require_free(out)
    temporary = out.with_name(f".{out.name}.writing")
    make_folder(temporary)
    with lock(temporary) as held:
        _delete_other_work(temporary, identity)
        try:
            yield temporary
        except CheckError:
            shutil.rmtree(temporary)
            raise
        sync_tree(temporary)
        for path in temporary.glob(".*"):
            if path.name != ".lock":
                path.unlink()
        held.require()
        (temporary / ".lock").unlink()
        sync_directory(temporary)
        require_free(out)
        os.replace(temporary, out)
        sync_directory(out.parent)


def has_record(directory: Path, identity: str) -> bool:
    """Whether all files are there and have the recorded hashes, and `identity` is theirs."""
    try:
        record = read_sealed(directory / RECORD, "identity")
        if record["identity"] != identity:
            return False
        require_files(directory, record)
    except (OSError, ValueError):
        return False
    return True


def write_record(
    directory: Path,
    identity: str,
    request: str,
    result: Mapping[str, Any],
    weights: Mapping[str, str],
) -> None:
    """Record what a directory was made from, and the hashes of its files. Write it last.

    Args:
        identity: as for `resumable_directory`.
        request: a hash of what the user asked for, for `find_finished`.
        result: what the command reports.
        weights: hashes that are known already; the other files are read. Users may edit README.md.
    """
    paths = (path for path in directory.rglob("*") if path.is_file())
    names = sorted(path.relative_to(directory).as_posix() for path in paths)
    skipped = {"README.md", RECORD, *weights}
    others = [name for name in names if name[0] != "." and name not in skipped]
    value = {"identity": identity, "request": request, **result}
    write_sealed(directory / RECORD, value, {**weights, **hashes_of(directory, others)})


def find_finished(out: Path, request: str) -> dict[str, Any] | None:
    """The record of `out` if an earlier call with the same `request` wrote it, else None.

    Raises:
        ExportError: if a file of it is missing or changed since then.
    """
    try:
        record = read_sealed(out / RECORD)
    except (OSError, ValueError):
        return None
    if record.get("request") != request:
        return None
    try:
        require_files(out, record)
    except ValueError as error:
        raise ExportError(
            f"{out} was written by this command, but {error}. Remove it and run the command again"
        ) from None
    return record


def _delete_other_work(temporary: Path, identity: str) -> None:
    """Keep the files of an earlier call with this identity; delete any others."""
    if has_record(temporary, identity):
        return
    (temporary / RECORD).unlink(missing_ok=True)
    recorded = temporary / _IDENTITY
    if recorded.is_file() and recorded.read_text(encoding="utf-8") == identity:
        return
    recorded.unlink(missing_ok=True)  # first: a kill here must not leave a part under its name
    for path in temporary.iterdir():
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
    """Write config, generation settings, tokenizer with chat template, and licences.

    Args:
        base: the base's directory.
        tokenizer: the one used in training.
        dtype: of the weights.
        is_tied: whether the head shares the embedding; None keeps the value of the base's config.
        end_ids: tokens that stop generation.
        with_code: copy the base's own Python code.
    """
    with reporting_full_disk(directory):
        write_json(directory / "config.json", _config(base, dtype, is_tied))
        write_json(directory / "generation_config.json", _generation(base, end_ids))
        save_tokenizer(tokenizer, directory)
        for path in _copied_files(base, with_code):
            shutil.copyfile(path, directory / path.name)


def _copied_files(base: Path, with_code: bool) -> list[Path]:
    """Licences, and the base's own Python code.

    Raises:
        ExportError: if one is a link to a file outside of the base: a downloaded folder could have
            any file of this machine published.
    """
    found = []
    for path in sorted(base.iterdir()):
        is_licence = any(fnmatch(path.name.lower(), pattern) for pattern in LICENCES)
        if path.is_file() and (is_licence or (with_code and path.suffix == ".py")):
            if not _is_inside(path, base):
                raise ExportError(
                    f"{path} is a link to {path.resolve()}, outside of its folder, and would be "
                    "copied into the merged model. Replace the link by the file, or remove it"
                )
            found.append(path)
    return found


def _is_inside(path: Path, base: Path) -> bool:
    """Whether a file is in the folder of the base, links followed. The hub's cache links from
    `snapshots/REVISION` to `blobs`."""
    folder = base.resolve()
    blobs = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    return any(path.resolve().is_relative_to(root) for root in (folder, *blobs))


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer with the chat template that training used.

    A base without a template gets the plain one, without the marks of answers: only transformers
    reads them.
    """
    template = ChatTemplate(tokenizer)
    own = tokenizer.chat_template
    if template.is_plain:
        tokenizer.chat_template = re.sub(r"{% (end)?generation %}", "", template.source)
    try:
        tokenizer.save_pretrained(directory)
    finally:
        tokenizer.chat_template = own


def _config(base: Path, dtype: torch.dtype, is_tied: bool | None) -> dict[str, Any]:
    """The base's config, with what has changed."""
    config = _read(base / "config.json")
    for stale in ("quantization_config", "torch_dtype", "_name_or_path"):
        config.pop(stale, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if is_tied is not None:
        config["tie_word_embeddings"] = is_tied
    return config


def _generation(base: Path, end_ids: Sequence[int]) -> dict[str, Any]:
    """Generation settings of the base (or of its config), with all tokens that end an answer."""
    require_generation_settings(base)
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
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} is damaged ({error}). Download the base again") from None
