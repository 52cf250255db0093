"""From a run to a merged model, with a measured proof that it is the trained one.

    score adapter on base -> score each candidate -> write the best -> read it back and compare

With `base="auto"` every candidate is loaded and scored on the held-out rows; one model is in memory
at a time. A base that is named is written at once; with `verify=False` no model is loaded at all.
"""

import dataclasses
import gc
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora_lite import report as reports
from qlora_lite.adapters.state import read_native
from qlora_lite.data.batches import Batch, in_order
from qlora_lite.data.load import load_data
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.evaluation.perplexity import Score, score
from qlora_lite.export.card import Card, licence_of, render
from qlora_lite.export.directory import (
    has_all_weights,
    require_free,
    unfinished,
    write_companions,
)
from qlora_lite.export.merge import (
    BaseOfMerge,
    MergedWeights,
    MergeSource,
    possible_bases,
    write,
)
from qlora_lite.export.verify import Agreement, candidate, compare, read_back, sample_logits
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.files import write_text
from qlora_lite.foundation.units import parse_bytes
from qlora_lite.foundation.watch import Watcher
from qlora_lite.model.load import load_tokenizer, locate
from qlora_lite.recipe import Recipe, load_recipe
from qlora_lite.report import MergeRow, Report
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.loading import load_run
from qlora_lite.run.training import held_out_batches
from qlora_lite.shards.reader import Checkpoint
from qlora_lite.training import metrics

CHECKED_ROWS = 16
"""Training rows that a merge is checked on where no rows are held out."""

LABELS = {
    "trained": "merged on the base as trained",
    "original": "merged on the original base",
}


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
    folder.read_record()
    recipe = load_recipe(folder.recipe)
    rule = devices.choose(device or recipe.device, recipe.base.compute)
    source, tokenizer = _source(folder, recipe, rule), load_tokenizer(recipe.base)
    wanted = None if dtype is None else devices.DTYPES[dtype]
    trial = _Trial(folder, recipe, source, rule, tokenizer, wanted, watcher)
    if base == "auto" or verify:
        trial.measure_reference()
    chosen: BaseOfMerge = trial.choose() if base == "auto" else base
    weights = MergedWeights(source, chosen, wanted)
    if weights.untied:
        trial.note(
            f"{', '.join(weights.untied)} shared the embedding's storage in the base and is "
            "written as a tensor of its own, because only one of the two was trained"
        )
    max_shard_bytes = parse_bytes(shard)
    with unfinished(out, f"{weights.identity} {max_shard_bytes}") as aside:
        if not has_all_weights(aside):
            write(weights, aside, max_shard_bytes, watcher.writing)
        write_companions(
            aside,
            source.path,
            tokenizer,
            dtype=weights.dtype,
            is_tied=False if weights.untied else None,
            end_ids=_end_ids(tokenizer),
            with_code=source.base.trust_remote_code,
        )
        trial.check_files(aside, weights)
        report = dataclasses.replace(_report(folder, recipe), merges=tuple(trial.table))
        given = ["--dtype", dtype] if dtype else []
        command = shlex.join(["qlora-lite", "merge", str(run), str(out), "--base", base, *given])
        write_text(aside / "README.md", render(_card(source, out, report, command, trial.notes)))
    if trial.table:
        reports.write(folder.report, report)
    num_bytes = sum(spec.num_bytes for spec in weights.specs)
    return MergeResult(
        out,
        chosen,
        weights.dtype,
        num_bytes,
        tuple(trial.table),
        trial.exact,
        trial.written,
        tuple(trial.notes),
    )


class _Trial:
    """The trained model's scores and logits, and what the candidates are held against."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        source: MergeSource,
        rule: DeviceRule,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype | None,
        watcher: Watcher,
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.source = source
        self.rule = rule
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.watcher = watcher
        self.notes: list[str] = []
        self.table: list[MergeRow] = []
        self.exact: Agreement | None = None
        self.written: Agreement | None = None
        self._reference: Tensor | None = None

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.watcher.note(text)

    def measure_reference(self) -> None:
        """Score the adapter on its base and keep some of its logits."""
        if self.rule.compute != self.source.rule.compute:
            self.note(
                f"trained in {devices.NAMES[self.source.rule.compute]} and scored here in "
                f"{devices.NAMES[self.rule.compute]}: scores differ a little from the run's own"
            )
        self._batches, self._is_heldout = self._rows()
        trained = load_run(self.folder.path, str(self.rule.device), self.watcher)
        self._reference = sample_logits(trained.causal, self._batches)
        self._score = score(trained.causal, self._batches)
        del trained
        _free()

    def choose(self) -> BaseOfMerge:
        """The base on which the merged model scores best; the trained one on a tie."""
        if self._is_fp32:
            self._prove()
        bases = possible_bases(self.source)
        if not self._is_heldout:
            self.note("no rows are held out, so nothing was scored: the base is the trained one")
            return "trained"
        scores = {base: self._score_candidate(base) for base in bases}
        best = min(bases, key=lambda base: scores[base].loss)
        self.table.append(MergeRow("adapter on its base", self._score.loss, None, False))
        for base, found in scores.items():
            agreement = found.agreement(self._score)
            self.table.append(MergeRow(LABELS[base], found.loss, agreement, base == best))
        return best

    def check_files(self, directory: Path, weights: MergedWeights) -> None:
        """Compare what transformers reads from the files with the trained model."""
        if self._reference is None:
            return
        model = read_back(directory, self.source.base, self.rule)
        found = compare(self._reference, sample_logits(model, self._batches))
        self.written = found
        del model
        _free()
        self.note(
            f"read back from the files, {found.top1:.1%} of {found.num_tokens} first guesses are "
            f"the trained model's, and the largest difference of a logit is "
            f"{found.relative_error:.1e} of the largest logit"
        )
        if weights.base == "trained" and weights.dtype == torch.float32 and self._is_fp32:
            assert found.is_exact, f"{directory} differs from the trained model: {found}"

    def _prove(self) -> None:
        """Before rounding, merged weights on the trained base are the trained function."""
        weights = MergedWeights(self.source, "trained", torch.float32)
        model = candidate(weights, self.source.base, self.rule)
        self.exact = compare(self._reference_logits, sample_logits(model, self._batches))
        del model
        _free()
        assert self.exact.is_exact, f"the merged model differs from the trained one: {self.exact}"
        self.note(
            "before rounding, the merged weights on the base as trained give the trained model's "
            f"logits to {self.exact.relative_error:.1e} of the largest one"
        )

    @property
    def _is_fp32(self) -> bool:
        """Training computed in fp32, and so does this machine."""
        return {self.rule.compute, self.source.rule.compute} == {torch.float32}

    @property
    def _reference_logits(self) -> Tensor:
        assert self._reference is not None
        return self._reference

    def _score_candidate(self, base: BaseOfMerge) -> Score:
        weights = MergedWeights(self.source, base, self.dtype)
        model = candidate(weights, self.source.base, self.rule)
        found = score(model, self._batches)
        del model
        _free()
        return found

    def _rows(self) -> tuple[list[Batch], bool]:
        """Held-out rows, or a few of the trained ones; and whether they are held out."""
        data = load_data(self.recipe.data, self.tokenizer, self.recipe.seed)
        if data.fingerprint != self.folder.read_sidecar()["data_fingerprint"]:
            self.note(
                "the data changed since the run: rows that count as held out now may have been "
                "trained on"
            )
        if len(data.heldout):
            return list(held_out_batches(self.recipe, data)), True
        few = data.train.select(range(min(CHECKED_ROWS, len(data.train))))
        longest = self.recipe.data.max_tokens
        return list(in_order(few, max_tokens=longest, micro_batch_tokens=longest)), False


def _source(folder: RunFolder, recipe: Recipe, rule: DeviceRule) -> MergeSource:
    """A run's adapter and base. Weights are dequantised to the dtype that training computed in.

    Raises:
        RunError: if the run is not finished, or its base is not what it was.
    """
    sidecar = folder.read_sidecar()
    path = locate(recipe.base)
    if Checkpoint.open(path).fingerprint != sidecar["base"]["fingerprint"]:
        raise RunError(
            f"the base {recipe.base.model} is not the one that {folder.path} was trained on: its "
            "files changed. Restore them; an adapter is right on its own base only"
        )
    held = sidecar["base"]
    return MergeSource(
        base=recipe.base,
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


def _report(folder: RunFolder, recipe: Recipe) -> Report:
    """The run's report, or what is left of it without its page."""
    if folder.report.is_file():
        return reports.read(folder.report)
    events = metrics.read(folder.metrics) if folder.metrics.is_file() else []
    return Report(folder.path.name, recipe.as_values(), events, {}, (), ())


def _card(
    source: MergeSource, out: Path, report: Report, command: str, notes: Sequence[str]
) -> Card:
    model = source.base.model
    return Card(
        title=out.name,
        base_model=Path(model).name if Path(model).is_dir() else model,
        licence=licence_of(source.path),
        commands=("qlora-lite train recipe.json", command),
        recipe=report.recipe,
        facts=report.facts,
        memory=report.memory,
        losses=[event["loss"] for event in report.metrics if "loss" in event],
        heldout=[(e["step"], e["heldout_loss"]) for e in report.metrics if "heldout_loss" in e],
        samples=[(sample.prompt, sample.before, sample.after) for sample in report.samples],
        merge=[dataclasses.astuple(row) for row in report.merges],
        notes=notes,
    )


def _end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens at which an answer ends."""
    return list(dict.fromkeys([ChatTemplate(tokenizer).end_of_turn_id, tokenizer.eos_token_id]))


def _free() -> None:
    """Give the memory of a model that is gone back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
