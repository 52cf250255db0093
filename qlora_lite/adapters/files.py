"""An adapter's directory: all tensors of its layers, and if possible a PEFT adapter.

native.safetensors                               all tensors of the layers, in their storage dtypes
qlora_lite.json                                  what the other files do not record
adapter_config.json, adapter_model.safetensors   the PEFT form (`peft.py`)
tokenizer.json, chat_template.jinja, ...         the tokenizer, written by the caller
README.md                                        if there is no PEFT form: why, and what to do;
                                                 of a GGUF base: how PEFT loads it
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.layer import Factors
from qlora_lite.adapters.peft import WEIGHTS, to_peft
from qlora_lite.adapters.peft_config import CONFIG
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.files import write_json, write_text
from qlora_lite.foundation.sealed import hashes_of, read_sealed, require_files, write_sealed
from qlora_lite.shards.writer import save_tensors

NATIVE = "native.safetensors"
SIDECAR = "qlora_lite.json"


def save_adapter(
    directory: Path,
    attached: AttachedAdapter,
    *,
    base: str,
    revision: str | None,
    sidecar: dict[str, Any],
    readme: str | None = None,
) -> None:
    """Write all files of an adapter into an existing directory, which may hold its tokenizer.

    Args:
        base: the base's hub id or absolute path, for programs that load the adapter.
        sidecar: what the PEFT format does not record.
        readme: README.md, if there is a PEFT form.
    """
    state = attached.state()
    require_finite(state, "the trained adapter")
    save_tensors(state, directory / NATIVE)
    tensors, config = to_peft(attached) if attached.is_base_unchanged else ({}, {})
    if config:
        config |= {"base_model_name_or_path": base, "revision": revision}
        save_tensors(tensors, directory / WEIGHTS)
        write_json(directory / CONFIG, config)
        if readme is not None:
            write_text(directory / "README.md", readme)
    else:
        write_text(directory / "README.md", _without_peft(attached))
    write_sealed(directory / SIDECAR, sidecar | {"peft": bool(config)}, _hashes(directory))


def save_at_rank(
    directory: Path,
    attached: AttachedAdapter,
    rank: int,
    *,
    base: str,
    revision: str | None,
    request: str,
) -> float:
    """Write the PEFT form of an adapter cut to `rank`, and return the largest relative error.

    The error is 0 for DyLoRA, which trained every rank. MoRA is approximated.

    Args:
        request: a hash of what the user asked for, recorded so that the same call finds its result.

    Raises:
        AdapterError: if the method has no pair of this rank, or changed the base weights.
    """
    if not attached.is_base_unchanged:
        raise AdapterError(
            f"adapter={attached.method.settings.kind} with these settings changed the base weights "
            "before quantisation, so its adapter does not work on the plain base. Merge the run"
        )
    pairs = {p: _cut(p, layer.factors(rank), rank) for p, layer in attached.layers.items()}
    largest = max(pair.rank for pair in pairs.values())
    if largest < rank:
        raise AdapterError(
            f"there is no adapter of rank {rank} here: the largest trained rank is {largest}"
        )
    tensors, config = to_peft(attached, pairs)
    error = max(pair.relative_error for pair in pairs.values())
    config |= {"base_model_name_or_path": base, "revision": revision}
    save_tensors(tensors, directory / WEIGHTS)
    write_json(directory / CONFIG, config)
    recorded = attached.method.settings.model_dump(mode="json")
    sidecar = {"adapter": recorded, "rank": rank, "relative_error": error, "request": request}
    write_sealed(directory / SIDECAR, sidecar, _hashes(directory))
    return error


def _hashes(directory: Path) -> dict[str, str]:
    """Hashes of the files of an adapter. Users may edit README.md."""
    names = (path.name for path in directory.iterdir() if path.is_file())
    return hashes_of(directory, sorted(name for name in names if name != "README.md"))


def _cut(path: str, pair: Factors | None, rank: int) -> Factors:
    if pair is None or pair.magnitude is not None:
        raise AdapterError(
            f"{path} has no adapter of rank {rank}: this method trains one rank, or a smaller one "
            "was trained. DyLoRA can be cut to any rank up to its own, and MoRA can be approximated"
        )
    return pair


def _without_peft(attached: AttachedAdapter) -> str:
    """The README.md of an adapter without a PEFT form."""
    kind = attached.method.settings.kind
    why = (
        f"`{kind}` with these settings cannot be written as a PEFT adapter without loss."
        if attached.is_base_unchanged
        else f"`{kind}` with these settings changed the base weights before quantisation: the "
        "adapter only works on that changed base, not on the plain one."
    )
    return (
        f"There is no PEFT adapter here. {why}\n\nMerge it: `qlora-lite merge RUN OUT` rebuilds "
        f"the base with the help of `{NATIVE}` and writes plain merged weights.\n"
    )


def read_native(directory: Path) -> dict[str, Tensor]:
    """Read `native.safetensors`: all tensors of a run's adapter by `path.name`.

    Raises:
        AdapterError: if the file is missing, damaged, or holds values that are not finite.
    """
    try:
        require_files(directory, read_sealed(directory / SIDECAR), NATIVE)
        state = load_file(directory / NATIVE)
        if not state:
            raise ValueError("it has no tensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(
            f"{directory / NATIVE} cannot be read ({error}). Restore it{how_to_rebuild(directory)}"
        ) from error
    require_finite(state, str(directory / NATIVE))
    return state


def how_to_rebuild(directory: Path) -> str:
    """How to get a run's adapter again, as the end of a message; empty without a checkpoint."""
    if not any((directory.parent / "checkpoints").glob("step-*")):
        return ""
    return f", or delete {directory} and train the run again: it continues from its last checkpoint"


def require_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Check that no tensor of an adapter holds NaN or infinity.

    Raises:
        AdapterError: naming the tensor.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise AdapterError(
                f"{name} of {where} is not finite: training diverged, or the file is damaged. Use "
                "an earlier checkpoint, or train again with a lower optim.lr"
            )
