"""From a run to a merged model, with a measured proof that it is the trained one.

    score adapter on base -> score each candidate -> write the best -> read it back and compare

With `base="auto"` every candidate is loaded and scored on the held-out rows; one model is in memory
at a time. A base that is named is written at once; with `verify=False` no model is loaded at all.
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
from qlora_lite.export.directory import has_all_weights, require_free, unfinished, write_companions
from qlora_lite.export.merge import MergedWeights, write
from qlora_lite.export.trained_layers import BaseOfMerge, MergeSource, TrainedLayers
from qlora_lite.export.verify import Agreement
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import ExportError
from qlora_lite.foundation.files import write_text
from qlora_lite.foundation.units import parse_bytes
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model.facts import read_facts
from qlora_lite.model.load import load_tokenizer
from qlora_lite.recipe import Recipe
from qlora_lite.recipe_files import load_recipe
from qlora_lite.report import page as reports
from qlora_lite.report.contents import MergeRow, Report
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.merge_check import MergeCheck
from qlora_lite.training import metrics

PLACES = ("model", "train", "heldout", "start", "output")
"""Settings that may be paths."""

SMALLEST_SHARD = 1000
"""Bytes of a file; less is a slip of the pen."""


@dataclass(frozen=True)
class MergeResult:
    """What was written, and how well it is the trained model."""

    out: Path
    base: BaseOfMerge
    dtype: torch.dtype
    num_bytes: int
    """Of the weights."""
    table: tuple[MergeRow, ...]
    """The scored candidates; empty if the base was named."""
    exact: Agreement | None
    """Of adapter on base with the merged weights before they are rounded, where training computed
    in fp32: not more than the order of sums apart."""
    written: Agreement | None
    """Of adapter on base with the files, read back by transformers."""
    notes: tuple[str, ...]


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
) -> MergeResult:
    """Add a run's adapter to its base and write the whole model to `out`.

    The same call after a kill goes on where that one stopped.

    Args:
        base: what to add to: the weights as training held them, the original ones, or (`auto`)
            whichever scores better on the held-out rows.
        dtype: of the written weights; each as the base stores it unless given.
        shard: largest size of a file.
        verify: load the result and compare it with the trained model; `auto` always does.
        device: where sums are made and models run; the run's own unless given.

    Raises:
        QloraLiteError: if there is no finished run, its base or data changed, this base cannot be
            merged into, or `out` is taken.
    """
    folder, out, watcher = RunFolder(Path(run)), Path(out), watcher or Watcher()
    require_free(out)
    if (max_shard_bytes := parse_bytes(shard)) < SMALLEST_SHARD:
        raise ExportError(f"got shard={shard}: a file takes 1 kB or more. Take 5GB, say")
    proof = _begin(folder, device, watcher)
    if base == "auto" or verify:
        proof.measure_reference()
    else:
        for note in folder.unfinished_extension():
            watcher.note(note)
    weights = _weights(proof, base, dtype)
    with unfinished(out, f"{weights.identity} {max_shard_bytes}") as aside:
        _write_model(aside, weights, proof.tokenizer, max_shard_bytes, watcher)
        proof.check_files(aside, weights)
        report = _report(proof)
        card = _card(proof, out, report, _command(run, out, base, dtype))
        write_text(aside / "README.md", render(card))
    if proof.table:
        reports.write(folder.report, report)
    return _result(out, weights, proof)


def _begin(folder: RunFolder, device: str | None, watcher: Watcher) -> MergeCheck:
    """What a merge needs of a run, checked before anything large is loaded."""
    folder.read_record()
    recipe = load_recipe(folder.recipe)
    rule = devices.choose(device or recipe.device, recipe.base.compute)
    source = merge_source(folder, recipe, rule)
    return MergeCheck(folder, recipe, source, rule, load_tokenizer(recipe.base), watcher)


def merge_source(folder: RunFolder, recipe: Recipe, rule: DeviceRule) -> MergeSource:
    """A run's adapter and base. Weights are dequantised to the dtype that training computed in.

    Raises:
        RunError: if the run is not finished, or its base is not what it was.
    """
    sidecar = folder.read_sidecar()
    path = folder.require_base(recipe.base)
    held = sidecar["base"]
    return MergeSource(
        base=recipe.base,
        facts=read_facts(recipe.base),
        path=path,
        rule=dataclasses.replace(
            rule,
            compute=devices.DTYPES[held["compute"]],
            storage=devices.DTYPES[held["storage"]],
            norms=devices.DTYPES[held["norms"]],
        ),
        adapter=recipe.adapter,
        state=read_native(folder.adapter),
        seed=recipe.seed,
    )


def _weights(
    proof: MergeCheck, base: Literal["auto", "trained", "original"], dtype: str | None
) -> MergedWeights:
    """The weights to write: on the base that was named, or on the better one."""
    wanted = None if dtype is None else devices.DTYPES[dtype]
    chosen: BaseOfMerge = proof.choose(wanted) if base == "auto" else base
    weights = MergedWeights(TrainedLayers(proof.source, chosen), wanted)
    if weights.untied:
        proof.note(
            f"{', '.join(weights.untied)} shared the embedding's storage in the base and is "
            "written as a tensor of its own, because only one of the two was trained"
        )
    return weights


def _write_model(
    directory: Path,
    weights: MergedWeights,
    tokenizer: PreTrainedTokenizerBase,
    max_shard_bytes: int,
    watcher: Watcher,
) -> None:
    """Weights, unless an earlier call wrote all of them, and what other tools read beside them."""
    if not has_all_weights(directory):
        write(weights, directory, max_shard_bytes, watcher.writing)
    write_companions(
        directory,
        weights.layers.source.path,
        tokenizer,
        dtype=weights.dtype,
        is_tied=False if weights.untied else None,
        end_ids=_end_ids(tokenizer),
        with_code=weights.layers.source.base.trust_remote_code,
    )


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens at which an answer ends."""
    return list(dict.fromkeys([ChatTemplate(tokenizer).end_of_turn_id, tokenizer.eos_token_id]))


def _report(proof: MergeCheck) -> Report:
    """The run's report, or what is left of it without its page, with the table of this merge."""
    folder = proof.folder
    if folder.report.is_file():
        report = reports.read(folder.report)
    else:
        events = metrics.read(folder.metrics)
        report = Report(folder.path.name, proof.recipe.to_dict(), events, {}, (), ())
    return dataclasses.replace(report, merges=tuple(proof.table))


def _command(run: str | Path, out: Path, base: str, dtype: str | None) -> str:
    """What to type for the same merge."""
    given = ["--dtype", dtype] if dtype else []
    places = [_without_folder(run), _without_folder(out)]
    return shlex.join(["qlora-lite", "merge", *places, "--base", base, *given])


def _card(proof: MergeCheck, out: Path, report: Report, command: str) -> Card:
    model = proof.source.base.model
    is_local = Path(model).is_dir()
    return Card(
        title=out.name,
        base_model=Path(model).name if is_local else model,
        on_hub=not is_local,
        licence=licence_of(proof.source.path),
        commands=("qlora-lite train recipe.json", command),
        recipe=_without_folders(report.recipe),
        facts=report.facts,
        memory=report.memory,
        losses=[event["loss"] for event in report.metrics if "loss" in event],
        heldout=[(e["step"], e["heldout_loss"]) for e in report.metrics if "heldout_loss" in e],
        samples=[(sample.prompt, sample.before, sample.after) for sample in report.samples],
        merge=[dataclasses.astuple(row) for row in report.merges],
        notes=proof.notes,
    )


def _without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe for others to read: where a file lies on this machine is nobody's business."""

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _without_folders(value)
        return _without_folder(value) if value and name in PLACES else value

    return {name: shown(name, value) for name, value in values.items()}


def _without_folder(path: str | Path) -> str:
    return Path(path).name if Path(path).is_absolute() else str(path)


def _result(out: Path, weights: MergedWeights, proof: MergeCheck) -> MergeResult:
    return MergeResult(
        out=out,
        base=weights.base,
        dtype=weights.dtype,
        num_bytes=sum(spec.num_bytes for spec in weights.specs),
        table=tuple(proof.table),
        exact=proof.exact,
        written=proof.written,
        notes=tuple(proof.notes),
    )
