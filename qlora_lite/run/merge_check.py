"""Check a merge: compare scores and logits of the merged model with those of the trained model.

    reference            adapter on its base: its held-out score and some of its logits
    before rounding      merged on the base as trained, in fp32, it must be the same function
    each candidate       the merged model in memory: on which base does it score better? The chosen
                         one must be within bounds of the reference, or nothing is written
    the files            read back with transformers, they must be the chosen candidate

One model is in memory at a time. Results are noted at once, and kept for the model card.
"""

import gc
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora_lite.data.batches import evaluation_batches
from qlora_lite.data.collate import Batch
from qlora_lite.data.load import load_data
from qlora_lite.evaluation.perplexity import Score, score
from qlora_lite.export.merge import MergedWeights
from qlora_lite.export.trained_layers import BaseOfMerge, MergeSource, TrainedLayers
from qlora_lite.export.verify import (
    EXACT,
    Agreement,
    Bounds,
    candidate,
    compare,
    original_bounds,
    read_back,
    rounding_bounds,
    sample_logits,
    sample_targets,
)
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import CheckError
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import BF16, FP32
from qlora_lite.recipe import Recipe
from qlora_lite.report.contents import MergeRow
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.job import held_out_batches
from qlora_lite.run.loading import load_run

CHECKED_ROWS = 16
"""Training rows that a merge is checked on if no rows are held out."""

LABELS = {
    "trained": "merged on the base as trained",
    "original": "merged on the original base",
}


@dataclass(frozen=True)
class _Reference:
    """Outputs of the trained model (adapter on base) for some rows."""

    batches: list[Batch]
    is_heldout: bool
    """The rows were not trained on, so their scores are meaningful."""
    logits: Tensor
    """At the first trained tokens, (tokens, vocabulary)."""
    targets: Tensor
    """Of these tokens."""
    score: Score
    bare: Tensor
    """Logits of the base as trained without the adapter, for the same tokens."""


class MergeCheck:
    """The comparisons of one merge, and what they found.

    Call `measure_reference` first, then `choose_base` if the base is not given, then
    `check_candidate` before anything is written, then `check_files`. Without a reference the last
    two do nothing, and no model is loaded.

    Args:
        folder: of a finished run.
        recipe: of that run.
        source: its adapter and base, in the dtypes of training.
        rule: device and dtypes in which the models run here.
        tokenizer: the one used in training.
    """

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        source: MergeSource,
        rule: DeviceRule,
        tokenizer: PreTrainedTokenizerBase,
        watcher: Watcher,
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.source = source
        self.rule = rule
        self.tokenizer = tokenizer
        self.watcher = watcher
        self.notes: list[str] = []
        """All notes, in order."""
        self.table: list[MergeRow] = []
        """The scored candidates; empty if the base was given or no rows are held out."""
        self.exact: Agreement | None = None
        """Reference against the merged weights before rounding; fp32 runs only."""
        self.written: Agreement | None = None
        """Reference against the files, read back by transformers."""
        self._measured: _Reference | None = None
        self._candidates: dict[BaseOfMerge, Tensor] = {}
        """Logits of the candidates, for the reference's tokens."""

    def note(self, text: str) -> None:
        """Pass a note to the watcher, and keep it for the card."""
        self.notes.append(text)
        self.watcher.note(text)

    def measure_reference(self) -> None:
        """Score the adapter on its base, and keep some of its logits."""
        if self.rule.compute != self.source.rule.compute:
            self.note(
                f"trained in {devices.NAMES[self.source.rule.compute]} and scored here in "
                f"{devices.NAMES[self.rule.compute]}: scores differ slightly from those of the run"
            )
        trained = load_run(
            self.folder.path,
            str(self.rule.device),
            self.watcher,
            trust_remote_code=self.recipe.base.trust_remote_code,
            facts=self.source.facts,
        )
        batches, is_heldout = self._rows(trained.packs)
        logits = sample_logits(trained.causal, batches)
        if not logits.isfinite().all():
            raise CheckError(
                f"the trained model of {self.folder.path} gives logits that are not finite. "
                "Nothing was merged: its training diverged, or its files are damaged"
            )
        targets, found = sample_targets(batches), score(trained.causal, batches)
        assert trained.attached is not None
        with trained.attached.disabled():
            bare = sample_logits(trained.causal, batches)
        self._measured = _Reference(batches, is_heldout, logits, targets, found, bare)
        del trained
        _release_memory()

    def choose_base(self, dtype: torch.dtype | None) -> BaseOfMerge:
        """The base on which the merged model scores best; the trained one on a tie.

        Args:
            dtype: of the weights that will be written; None for those of the base.
        """
        if self._is_fp32:
            self._check_before_rounding()
        bases = self.source.bases
        if not self._reference.is_heldout:
            self.note("no rows are held out, so nothing was scored: using the base as trained")
            return "trained"
        scores = {base: self._score_candidate(base, dtype) for base in bases}
        finite = [base for base in bases if math.isfinite(scores[base].loss)]
        best = min(finite or bases, key=lambda base: scores[base].loss)
        trained = self._reference.score
        self.table.append(MergeRow("adapter on its base", trained.loss, None, False))
        for base, found in scores.items():
            agreement = found.agreement(trained)
            self.table.append(MergeRow(LABELS[base], found.loss, agreement, base == best))
        return best

    def check_candidate(self, weights: MergedWeights) -> None:
        """Compare the merged model in memory with the reference, if there is one.

        Raises:
            CheckError: if it is not finite, or further away than rounding explains.
        """
        if self._measured is None:
            return
        logits = self._candidate_logits(weights)
        found = compare(self._reference.logits, logits, self._reference.targets)
        problem = self._bounds(weights).problem(found)
        if not logits.isfinite().all():
            problem = "its logits are not finite"
        if problem:
            raise CheckError(
                f"{LABELS[weights.base]} in {devices.NAMES[weights.dtype]}, the model is not the "
                f"trained one: {problem}. Nothing was written. Try another --base or --dtype fp32"
            )

    def check_files(self, directory: Path, weights: MergedWeights) -> None:
        """Compare what transformers reads from the files with the candidate, if there is one.

        Raises:
            CheckError: if it is another function.
        """
        if self._measured is None:
            return
        model = read_back(directory, self.source.base, self.rule)
        logits = sample_logits(model, self._reference.batches)
        del model
        _release_memory()
        copied = compare(self._candidate_logits(weights), logits)
        # the same weights in the same dtype: only the order of sums may differ
        allowed = EXACT if self.rule.compute == torch.float32 else _few_roundings(self.rule.compute)
        if not copied.relative_error <= allowed:
            raise CheckError(
                f"the files read back by transformers differ from the merged model by "
                f"{copied.relative_error:.1e} of the largest logit, at most {allowed:.0e} may be. "
                "They were deleted"
            )
        found = compare(self._reference.logits, logits, self._reference.targets)
        self.written = found
        self.note(
            f"files read back: {found.top1:.1%} of {found.num_tokens} top-1 predictions are those "
            f"of the trained model, and logits differ by at most {found.relative_error:.1e} of the "
            f"largest logit; {self._bounds_text(weights)}"
        )

    def _bounds(self, weights: MergedWeights) -> Bounds:
        matrices = [spec for spec in weights.specs if len(spec.shape) > 1]
        logits = self._reference.logits
        rounding = rounding_bounds(logits, weights.dtype, self.rule.compute, len(matrices))
        if weights.base == "trained":
            return rounding
        return original_bounds(logits, self._reference.bare, self._original_logits, rounding)

    def _bounds_text(self, weights: MergedWeights) -> str:
        """The bounds that were kept, for the note."""
        bounds = self._bounds(weights)
        return (
            f"bounds: RMS difference {bounds.rms_error:.1%}, the loss may be "
            f"{bounds.loss_change:.3f} nats higher"
        )

    @cached_property
    def _original_logits(self) -> Tensor:
        """Logits of the original base without an adapter, for the reference's tokens."""
        quant = FP32() if self.rule.compute == torch.float32 else BF16()
        base = self.source.base.model_copy(update={"quant": quant, "head": "16bit"})
        loaded = load_base(base, self.rule, facts=self.source.facts, files=self.source.files)
        logits = sample_logits(CausalModel(loaded.model), self._reference.batches)
        del loaded
        _release_memory()
        return logits

    def _check_before_rounding(self) -> None:
        """Before rounding, weights merged on the base as trained must give the trained logits."""
        weights = MergedWeights(TrainedLayers(self.source, "trained"), torch.float32)
        model = candidate(weights, self.source.base, self.rule)
        found = compare(self._reference.logits, sample_logits(model, self._reference.batches))
        self.exact = found
        del model
        _release_memory()
        if not found.is_exact:
            raise CheckError(
                f"the merged model differs from the trained one by {found.relative_error:.1e} of "
                f"the largest logit before rounding, at most {EXACT:.0e} may be. Nothing was "
                "written. This is a bug in qlora-lite or in a library: please report it"
            )
        self.note(
            "before rounding, the merged model's logits equal the trained model's: they differ by "
            f"{found.relative_error:.1e} of the largest logit"
        )

    def _candidate_logits(self, weights: MergedWeights) -> Tensor:
        """Logits of the merged model in memory, in the dtype of the files."""
        if weights.base not in self._candidates:
            model = candidate(weights, self.source.base, self.rule)
            self._candidates[weights.base] = sample_logits(model, self._reference.batches)
            del model
            _release_memory()
        return self._candidates[weights.base]

    def _score_candidate(self, base: BaseOfMerge, dtype: torch.dtype | None) -> Score:
        weights = MergedWeights(TrainedLayers(self.source, base), dtype)
        model = candidate(weights, self.source.base, self.rule)
        self._candidates[base] = sample_logits(model, self._reference.batches)
        found = score(model, self._reference.batches)
        del model
        _release_memory()
        return found

    def _rows(self, packs: bool) -> tuple[list[Batch], bool]:
        """Held-out rows, or a few of the trained ones; and whether they are held out."""
        data = load_data(self.recipe.data, self.tokenizer, self.recipe.seed, self.watcher.reading)
        if data.fingerprint != self.folder.read_sidecar()["data_fingerprint"]:
            self.note(
                "the data changed since the run: rows that are held out now may have been "
                "trained on"
            )
        if len(data.heldout):
            return list(held_out_batches(self.recipe, data.heldout, packs)), True
        few = data.train.select(range(min(CHECKED_ROWS, len(data.train))))
        longest = self.recipe.data.max_tokens
        batches = evaluation_batches(
            few,
            max_tokens=longest,
            micro_batch_tokens=longest,
            packing=self.recipe.data.packing and packs,
        )
        return list(batches), False

    @property
    def _is_fp32(self) -> bool:
        """Whether training computed in fp32 and models run in fp32 here."""
        return {self.rule.compute, self.source.rule.compute} == {torch.float32}

    @property
    def _reference(self) -> _Reference:
        assert self._measured is not None, "measure_reference comes first"
        return self._measured


def _few_roundings(dtype: torch.dtype) -> float:
    """Sixteen roundings to `dtype`, relative."""
    return 16 * torch.finfo(dtype).eps


def _release_memory() -> None:
    """Release the memory of a deleted model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
