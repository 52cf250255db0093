"""Find the `config.json` of a model: in a directory, in the hub's cache or on the hub.

config = read_config("Qwen/Qwen3-8B")     # downloads only this file
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig

from qlora_lite.foundation.errors import BaseModelError, QloraLiteError
from qlora_lite.foundation.files import is_directory, is_file, read_object
from qlora_lite.foundation.json_files import JsonFile, Malformed, read_as
from qlora_lite.model.config_sizes import require_possible_numbers, require_possible_sizes
from qlora_lite.model.gguf.config import config_from_gguf
from qlora_lite.shards.gguf.header import find_gguf, read_header


def read_config(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    known: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """The config of a model directory, a GGUF file or a hub id. Never downloads weights.

    Searched in this order: a local directory, the hub's cache, `known`, the hub.

    Args:
        known: a config dictionary with its `model_type`, used if the file is not on this machine.

    Raises:
        BaseModelError: if there is no such model, it cannot be downloaded or read, or the installed
            transformers does not know its architecture.
    """
    if model and "\0" not in model and (gguf := find_gguf(Path(model))) is not None:
        if revision is not None:
            raise BaseModelError(
                f"got base.revision={revision} for the GGUF file {gguf}: only models from the hub "
                "have revisions. Leave it out"
            )
        config = config_from_gguf(read_header(gguf))
        config.name_or_path = model
        with reading_config(model):
            require_possible_sizes(model, config)
        return config
    if not model or "\0" in model or is_file(Path(model)):
        raise BaseModelError(
            f"base.model={model}: this is not a model. Give a model directory, a GGUF "
            "file, or a hub id such as Qwen/Qwen3-0.6B"
        )
    if is_directory(Path(model)):
        file = Path(model) / "config.json"
        if not file.is_file():
            raise BaseModelError(
                f"base.model={model}: this directory has no config.json. Give a directory that "
                "`save_pretrained` wrote, a GGUF file, or a hub id such as Qwen/Qwen3-0.6B"
            )
    else:
        cached = try_to_load_from_cache(require_hub_id(model), "config.json", revision=revision)
        if isinstance(cached, str):
            file = Path(cached)
        elif known is not None:
            return AutoConfig.for_model(**known)
        else:
            file = _fetch_config(model, revision)
    values = _read_values(model, file)
    _require_no_kernels(model, values)
    require_possible_numbers(model, values)
    # transformers finds a model's own code by the hub id; it may not be in the cache yet
    source = model if trust_remote_code else file.parent
    with reading_config(model):
        config = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
        require_possible_sizes(model, config)
    return config


@contextmanager
def reading_config(model: str) -> Iterator[None]:
    """Turn whatever transformers raises for a config into our error.

    A config is foreign data. Wrong types, values out of range and fields that contradict each
    other end in any exception, in the config class or where the model is built.

    Raises:
        BaseModelError: if the block raises.
    """
    try:
        yield
    except QloraLiteError:
        raise
    except Exception as error:
        is_text = isinstance(error, ValueError | OSError)
        text = str(error) if is_text else f"{type(error).__name__}: {error}"
        raise BaseModelError(unusable(model, text)) from error


TokenIds = int | list[int] | None


class GenerationFile(JsonFile):
    """The fields of `generation_config.json` that we use."""

    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None


def require_generation_settings(directory: Path) -> None:
    """Check `generation_config.json`, if there is one.

    Raises:
        BaseModelError: if it is damaged.
    """
    path = directory / "generation_config.json"
    if path.exists():
        try:
            read_as(path, GenerationFile)
        except Malformed as error:
            raise BaseModelError(
                f"{path} is damaged ({error}). Download it again, or delete it"
            ) from None


def _read_values(model: str, file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise BaseModelError(unusable(model, f"it is damaged ({error}).")) from None


def _require_no_kernels(model: str, values: Mapping[str, Any]) -> None:
    """Refuse a config that names code on the hub: transformers would download and run it.

    Raises:
        BaseModelError: naming the field.
    """
    for name, value in _implementations(values):
        if "/" in value:
            raise BaseModelError(
                f"base.model={model}: its config.json has {name}={value!r}, which is code on "
                "the hub that would run on this machine. Remove the field from config.json"
            )


def _implementations(values: Mapping[str, Any], owner: str = "") -> Iterator[tuple[str, str]]:
    """Every text under a field such as `attn_implementation`, at any depth."""
    for name, value in values.items():
        field = name if name.endswith("_implementation") else owner
        if isinstance(value, Mapping):
            yield from _implementations(value, field)
        elif field and isinstance(value, str):
            yield field, value


def require_hub_id(model: str) -> str:
    """Check that `model` has the form of a hub id, and return it.

    Raises:
        BaseModelError: if it is an address, a GGUF file, or a path that does not exist.
    """
    if _is_local_name(model):
        raise BaseModelError(
            f"base.model={model}: there is no such run or model here. Give the folder of a run or "
            "of a model, a GGUF file, or a hub id such as Qwen/Qwen3-0.6B"
        )
    if model.lower().endswith(".gguf"):
        raise BaseModelError(
            f"base.model={model}: there is no such file. Give the path of a GGUF file on this "
            "machine, or the hub id of a model with safetensors"
        )
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        if model.startswith("https://huggingface.co/"):
            repository = "/".join(model.removeprefix("https://huggingface.co/").split("/")[:2])
            raise BaseModelError(
                f"base.model={model} is an address. Give the model's id: {repository}"
            ) from error
        raise BaseModelError(
            f"base.model={model}: there is no such directory. Give the directory of a model with "
            "its config.json, a GGUF file, or a hub id such as Qwen/Qwen3-0.6B"
        ) from error
    return model


def _is_local_name(model: str) -> bool:
    """Whether a name that does not exist was meant as a path: it is in `runs`, or in a folder that
    has runs. The hub is not asked for these."""
    parent, _, name = model.partition("/")
    if parent in ("", ".", "..", "~") or not name:
        return False  # no hub id has this form
    try:
        return parent == "runs" or any(Path(parent).glob("*/recipe.json"))
    except (OSError, ValueError):
        return False


def _fetch_config(model: str, revision: str | None) -> Path:
    """Download `config.json` into the hub's cache."""
    if "/" not in model:
        raise BaseModelError(
            f"base.model={model}: there is no such directory, and a hub id has an owner, such as "
            "openai-community/gpt2. Give one of the two"
        )
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except OSError as error:
        raise BaseModelError(unreachable(model, revision, error)) from error


def unreachable(model: str, revision: str | None, error: OSError) -> str:
    """Error message for a file that could not be downloaded from the hub."""
    at = f" at revision {revision}" if revision else ""
    return f"base.model={model}{at}: {_hub_problem(model, error)}"


def hub_error(error: BaseException) -> OSError | None:
    """The hub's error in the chain of causes of `error`, because libraries wrap it; None if the hub
    is not the cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RepositoryNotFoundError | LocalEntryNotFoundError):  # or gated
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _hub_problem(model: str, error: OSError) -> str:
    """The problem, and what to do. The order matters: a gated repository also counts as missing."""
    match error:
        case GatedRepoError():
            return (
                "its owners ask you to accept a licence first. Accept it on "
                f"https://huggingface.co/{model}, then log in with `hf auth login`"
            )
        case RepositoryNotFoundError():
            return (
                "this is neither a directory nor a model that you can see on the hub. Check the "
                "spelling; for a private model log in with `hf auth login`"
            )
        case RevisionNotFoundError():
            return "the hub has the model, but not this revision. Leave base.revision out for main"
        case LocalEntryNotFoundError() if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set"
        case LocalEntryNotFoundError():
            reason = "the hub does not answer"
        case EntryNotFoundError():
            return "it has no config.json on the hub, so it is not a transformers model"
        case _:
            reason = str(error).splitlines()[0]
    return (
        f"it is not on this machine, and {reason}. Its files are needed (for a plan only its "
        "config.json): connect to the hub once, or give the directory of a downloaded model"
    )


def unusable(model: str, reason: str) -> str:
    """Error message for a config that transformers cannot use."""
    if "trust_remote_code" in reason:
        return brings_code(model)
    lines = [line for line in reason.splitlines() if line.strip()] or ["no reason given."]
    return (
        f"base.model={model}: transformers cannot use its config.json: {' '.join(lines[:2])[:300]} "
        "Check that it is a causal language model, and whether a newer transformers knows it"
    )


def brings_code(model: str) -> str:
    """Error message for a model that needs its own Python code, which was not allowed."""
    return (
        f"base.model={model} comes with its own Python code, which would run on this machine. "
        "Read it first, then allow it with base.trust_remote_code=true"
    )
