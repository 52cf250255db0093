"""From a run to a merged model, compared with the trained one.

    score adapter on base -> score each candidate -> write the best -> read it back and compare

With `base="auto"` every candidate is loaded and scored on the held-out rows; one model is in memory
at a time. With a given base there is nothing to choose; with `verify=False` no model is loaded.
"""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from qlora_lite.adapters.files import read_native
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.export.card import Card, licence_of, render
from qlora_lite.export.directory import (
    find_finished,
    has_record,
    require_free,
    resumable_directory,
    write_companions,
    write_record,
)
from qlora_lite.export.merge import MergedWeights, write
from qlora_lite.export.trained_layers import BaseOfMerge, MergeSource, TrainedLayers
from qlora_lite.export.verify import Agreement
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import ExportError
from qlora_lite.foundation.files import write_text
from qlora_lite.foundation.sealed import digest_of
from qlora_lite.foundation.units import parse_bytes
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model.facts import read_facts
from qlora_lite.recipe import Recipe
from qlora_lite.report import page as reports
from qlora_lite.report.contents import MergeRow, Report
from qlora_lite.run.computing import rule_of_run
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.merge_check import MergeCheck
from qlora_lite.run.tokenizers import trained_tokenizer
from qlora_lite.training import metrics

PATH_SETTINGS = ("model", "train", "heldout", "start", "output")
"""Settings that may be paths."""

MIN_SHARD_BYTES = 1000
"""Smaller values are probably typos."""


@dataclass(frozen=True)
class MergeResult:
    """What was written, and how it compares with the trained model."""

    out: Path
    base: BaseOfMerge
    dtype: torch.dtype
    num_bytes: int
    """Of the weights."""
    table: tuple[MergeRow, ...]
    """The scored candidates; empty if the base was given."""
    exact: Agreement | None
    """Adapter on base against the merged weights before rounding, if training computed in fp32:
    they differ only by the order of sums."""
    written: Agreement | None
    """Adapter on base against the files, read back by transformers."""
    notes: tuple[str, ...]
    already_finished: bool = False
    """An earlier call wrote `out`. Its files have the recorded hashes; nothing was compared now."""


def merge(
    run: str | Path,
    out: str | Path,
    *,
    base: Literal["auto", "trained", "original"] = "auto",
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    shard: str | int = "5GB",
    verify: bool = True,
    device: str | None = None,
    watcher: Watcher | None = None,
    trust_remote_code: bool = False,
) -> MergeResult:
    """Add a run's adapter to its base and write the merged model to `out`.

    If it is killed, the same call continues from there.

    Args:
        base: what to add the adapter to: `trained` is the quantised weights as training used them,
            `original` those of the checkpoint (of a GGUF file, dequantised), `auto` the one that
            scores better on held-out rows.
        dtype: of the written weights; unless given, that of each tensor in the base, and bf16 for
            a GGUF file.
        shard: largest size of a file.
        verify: load the result and compare it with the trained model; `auto` always does.
        device: where sums are made and models run; the run's own unless given.
        trust_remote_code: let the base run its own Python code.

    Raises:
        QloraLiteError: if there is no finished run, its base or data changed, the adapter does not
            fit this base, or `out` exists.
    """
    folder, out, watcher = RunFolder(Path(run)), Path(out), watcher or Watcher()
    if (max_shard_bytes := parse_bytes(shard)) < MIN_SHARD_BYTES:
        raise ExportError(
            f"got shard={shard}, and a file must be 1 kB or larger. Use 5GB, for example"
        )
    request = _request(folder, base, dtype, max_shard_bytes)
    if (finished := find_finished(out, request)) is not None:
        return _finished_result(out, finished)
    require_free(out)
    check = _prepare(folder, device, watcher, trust_remote_code)
    if base == "auto" or verify:
        check.measure_reference()
    else:
        for note in folder.unfinished_extension():
            watcher.note(note)
    weights = _weights(check, base, dtype)
    check.check_candidate(weights)
    identity = f"{weights.identity} {max_shard_bytes}"
    with resumable_directory(out, identity) as temporary:
        _write_model(
            temporary, weights, check.tokenizer, max_shard_bytes, identity, request, watcher
        )
        check.check_files(temporary, weights)
        report = _report(check)
        card = _card(check, out, report, _command(run, out, base, dtype))
        write_text(temporary / "README.md", render(card))
        if check.table:
            reports.write(folder.report, report)
    return _result(out, weights, check)


def _request(folder: RunFolder, base: str, dtype: str | None, max_shard_bytes: int) -> str:
    """A hash of what was asked for: the same call finds its finished result by it."""
    folder.read_record()
    return digest_of([folder.read_sidecar(), base, dtype, max_shard_bytes])


def _prepare(
    folder: RunFolder, device: str | None, watcher: Watcher, trust_remote_code: bool
) -> MergeCheck:
    """Read what a merge needs from the run, and check it before anything large is loaded."""
    recipe = folder.trained_recipe(trust_remote_code=trust_remote_code)
    rule = rule_of_run(recipe, folder, device)
    source = merge_source(folder, recipe, rule, every_byte=True)
    if not folder.read_sidecar()["base"].get("sha256"):
        watcher.note("the run recorded no full hash of its base: it was compared by samples")
    tokenizer = trained_tokenizer(recipe, folder)
    return MergeCheck(folder, recipe, source, rule, tokenizer, watcher)


def merge_source(
    folder: RunFolder, recipe: Recipe, rule: DeviceRule, *, every_byte: bool = False
) -> MergeSource:
    """A run's adapter and base. Weights are dequantised to the compute dtype of training.

    Args:
        every_byte: compare every byte of the base with that of training, not only samples.

    Raises:
        RunError: if the run is not finished, or its base changed.
    """
    sidecar = folder.read_sidecar()
    files = folder.require_base(recipe.base, every_byte=every_byte)
    recorded = sidecar["base"]
    return MergeSource(
        base=recipe.base,
        facts=read_facts(recipe.base),
        files=files,
        rule=dataclasses.replace(
            rule,
            compute=devices.DTYPES[recorded["compute"]],
            storage=devices.DTYPES[recorded["storage"]],
            norms=devices.DTYPES[recorded["norms"]],
        ),
        adapter=recipe.adapter,
        state=read_native(folder.adapter),
        seed=recipe.seed,
    )


def _weights(
    check: MergeCheck, base: Literal["auto", "trained", "original"], dtype: str | None
) -> MergedWeights:
    """The weights to write: on the given base, or on the better one."""
    is_gguf = check.source.files.is_gguf
    if dtype is None and is_gguf:
        dtype = "bf16"
    wanted = None if dtype is None else devices.DTYPES[dtype]
    chosen: BaseOfMerge = check.choose_base(wanted) if base == "auto" else base
    weights = MergedWeights(TrainedLayers(check.source, chosen), wanted)
    if is_gguf and chosen == "original":
        check.note(
            f"the original weights are those of {check.source.files.weights.name}, dequantised: a "
            "GGUF file has no others"
        )
    if weights.untied:
        check.note(
            f"{', '.join(weights.untied)} was tied to the embedding in the base and is written as "
            "a separate tensor, because only one of the two was trained"
        )
    return weights


def _write_model(
    directory: Path,
    weights: MergedWeights,
    tokenizer: PreTrainedTokenizerBase,
    max_shard_bytes: int,
    identity: str,
    request: str,
    watcher: Watcher,
) -> None:
    """Write weights, config, tokenizer and record, unless an earlier call did."""
    if has_record(directory, identity):
        return
    hashes = write(weights, directory, max_shard_bytes, watcher.writing)
    write_companions(
        directory,
        weights.layers.source.files.directory,
        tokenizer,
        dtype=weights.dtype,
        is_tied=False if weights.untied else None,
        end_ids=_end_ids(tokenizer),
        with_code=weights.layers.source.base.trust_remote_code,
    )
    result = {
        "base": weights.base,
        "dtype": devices.NAMES[weights.dtype],
        "num_bytes": sum(spec.num_bytes for spec in weights.specs),
    }
    write_record(directory, identity, request, result, hashes)


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens at which an answer ends."""
    return list(dict.fromkeys([ChatTemplate(tokenizer).end_of_turn_id, tokenizer.eos_token_id]))


def _report(check: MergeCheck) -> Report:
    """The run's report with the table of this merge; without report.html, from recipe and log."""
    folder = check.folder
    if folder.report.is_file():
        report = reports.read(folder.report)
    else:
        events = metrics.read(folder.metrics)
        report = Report(folder.path.name, check.recipe.to_dict(), events, {}, (), ())
    return dataclasses.replace(report, merges=tuple(check.table))


def _command(run: str | Path, out: Path, base: str, dtype: str | None) -> str:
    """The command line of this merge."""
    given = ["--dtype", dtype] if dtype else []
    paths = [_without_folder(run), _without_folder(out)]
    return shlex.join(["qlora-lite", "merge", *paths, "--base", base, *given])


def _card(check: MergeCheck, out: Path, report: Report, command: str) -> Card:
    model = check.source.base.model
    licence: dict[str, Any] = {}
    try:
        licence = licence_of(check.source.files.directory)
    except ValueError as error:
        check.note(f"the card has no licence, because that of the base is unknown: {error}")
    is_local = Path(model).exists()
    return Card(
        title=out.name,
        base_model=Path(model).name if is_local else model,
        on_hub=not is_local,
        licence=licence,
        commands=("qlora-lite train recipe.json", command),
        recipe=_without_folders(report.recipe),
        facts=report.facts,
        memory=report.memory,
        losses=[event["loss"] for event in report.metrics if "loss" in event],
        heldout=[(e["step"], e["heldout_loss"]) for e in report.metrics if "heldout_loss" in e],
        samples=[(sample.prompt, sample.before, sample.after) for sample in report.samples],
        merge=[dataclasses.astuple(row) for row in report.merges],
        notes=check.notes,
    )


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe for publishing: absolute paths of this machine are cut to their last part."""

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _without_folders(value)
        return _without_folder(value) if value and name in PATH_SETTINGS else value

    return {name: shown(name, value) for name, value in values.items()}


def _without_folder(path: str | Path) -> str:
    return Path(path).name if Path(path).is_absolute() else str(path)


def _result(out: Path, weights: MergedWeights, check: MergeCheck) -> MergeResult:
    return MergeResult(
        out=out,
        base=weights.base,
        dtype=weights.dtype,
        num_bytes=sum(spec.num_bytes for spec in weights.specs),
        table=tuple(check.table),
        exact=check.exact,
        written=check.written,
        notes=tuple(check.notes),
    )


def _finished_result(out: Path, record: Mapping[str, Any]) -> MergeResult:
    return MergeResult(
        out=out,
        base=record["base"],
        dtype=devices.DTYPES[record["dtype"]],
        num_bytes=record["num_bytes"],
        table=(),
        exact=None,
        written=None,
        notes=(),
        already_finished=True,
    )
