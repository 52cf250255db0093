"""The `config.json` of a model: found here, in the hub's cache or on the hub, or a word why not.

config = read_config("Qwen/Qwen3-8B")     # the only file that is fetched
"""

from collections.abc import Mapping
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

from qlora_lite.foundation.errors import BaseModelError


def read_config(
    model: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    known: Mapping[str, Any] | None = None,
) -> PretrainedConfig:
    """The config of a model directory or a hub id: one small file, never weights.

    Looked for in a local directory, in the hub's cache, in `known` and at last on the hub.

    Args:
        known: facts to fall back on when the file is not on this machine, as a config dictionary
            with its `model_type`.

    Raises:
        BaseModelError: if there is no such model, it cannot be reached or opened, or this
            transformers does not know its architecture.
    """
    if Path(model).is_file() or not model:
        raise BaseModelError(
            f"base.model={model}: that is no model. Give the directory of one, or a hub id such as "
            "Qwen/Qwen3-0.6B"
        )
    if Path(model).is_dir():
        file = Path(model) / "config.json"
        if not file.is_file():
            raise BaseModelError(
                f"base.model={model}: this directory has no config.json. Give a directory that "
                "`save_pretrained` wrote, or a hub id such as Qwen/Qwen3-0.6B"
            )
    else:
        cached = try_to_load_from_cache(require_hub_id(model), "config.json", revision=revision)
        if isinstance(cached, str):
            file = Path(cached)
        elif known is not None:
            return AutoConfig.for_model(**known)
        else:
            file = _fetch_config(model, revision)
    # code of a model's own is found by the hub id, beside the config it may not be there yet
    source = model if trust_remote_code else file.parent
    try:
        return AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, OSError) as error:
        raise BaseModelError(unusable(model, str(error))) from error


def require_hub_id(model: str) -> str:
    """A hub id, or a clear word about a path that leads nowhere."""
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        if model.startswith("https://huggingface.co/"):
            repository = "/".join(model.removeprefix("https://huggingface.co/").split("/")[:2])
            raise BaseModelError(
                f"base.model={model} is an address. Its id is {repository}: give that"
            ) from error
        raise BaseModelError(
            f"base.model={model}: there is no such directory. Give the directory of a model with "
            "its config.json, or a hub id such as Qwen/Qwen3-0.6B"
        ) from error
    return model


def _fetch_config(model: str, revision: str | None) -> Path:
    """`config.json` brought from the hub into its cache."""
    if "/" not in model:
        raise BaseModelError(
            f"base.model={model}: there is no such directory here, and an id of the hub has an "
            "owner, such as openai-community/gpt2. Give one of the two"
        )
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except OSError as error:
        raise BaseModelError(unreachable(model, revision, error)) from error


def unreachable(model: str, revision: str | None, error: OSError) -> str:
    """Why the hub gave no file of a model, and what to do."""
    at = f" at revision {revision}" if revision else ""
    return f"base.model={model}{at}: {_hub_problem(model, error)}"


def hub_error(error: BaseException) -> OSError | None:
    """The hub's own error that a library wrapped in one that says less, if the hub is to blame."""
    told: BaseException | None = error
    while told is not None:
        if isinstance(told, RepositoryNotFoundError | LocalEntryNotFoundError):  # or gated
            return told
        told = told.__cause__ or told.__context__
    return None


def _hub_problem(model: str, error: OSError) -> str:
    """Why the hub gave no file, and what to do. A gated model is also a model not found."""
    match error:
        case GatedRepoError():
            return (
                "its owners ask you to accept a licence first. Accept it on "
                f"https://huggingface.co/{model}, then log in with `hf auth login`"
            )
        case RepositoryNotFoundError():
            return (
                "neither a directory here nor a model that the hub shows you. Check the spelling; "
                "for a private model log in with `hf auth login`"
            )
        case RevisionNotFoundError():
            return "the hub has the model, not this revision. Leave base.revision out for main"
        case LocalEntryNotFoundError() if constants.is_offline_mode():
            reason = "HF_HUB_OFFLINE is set"
        case LocalEntryNotFoundError():
            reason = "the hub does not answer"
        case EntryNotFoundError():
            return "the hub has it without a config.json, so it is no transformers model"
        case _:
            reason = str(error).splitlines()[0]
    return (
        f"not on this machine, and {reason}. Its files are needed here (for a plan only its "
        "config.json): connect to the hub once, or give the directory of a downloaded model"
    )


def unusable(model: str, reason: str) -> str:
    """Why transformers makes nothing of a config, and what to do."""
    if "trust_remote_code" in reason:
        return (
            f"base.model={model} brings its own Python code, which would run on this machine. "
            "Read it first; then base.trust_remote_code=true allows it"
        )
    return (
        f"base.model={model}: transformers cannot use its config.json: {reason.splitlines()[0]} "
        "Check that it is a causal language model, and whether a newer transformers knows it"
    )
