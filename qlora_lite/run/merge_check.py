"""The proof of a merge: scores and logits of the trained model, and what is held against them.

    reference            adapter on its base: its score on the held-out rows, some of its logits
    each candidate       on which base does the merged model score better?
    before rounding      merged on the base as trained, in fp32, it is the same function
    the files            what everybody will load, read back and held against the reference

One model is in memory at a time.  What is found is told as it is found, and kept for the card.
"""

import gc
from dataclasses import dataclass
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
from qlora_lite.export.verify import Agreement, candidate, compare, read_back, sample_logits
from qlora_lite.foundation import device as devices
from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.recipe import Recipe
from qlora_lite.report.contents import MergeRow
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.job import held_out_batches
from qlora_lite.run.loading import load_run

CHECKED_ROWS = 16
"""Training rows that a merge is checked on where no rows are held out."""

LABELS = {
    "trained": "merged on the base as trained",
    "original": "merged on the original base",
}


@dataclass(frozen=True)
class _Reference:
    """What the trained model, adapter on base, says to some rows."""

    batches: list[Batch]
    is_heldout: bool
    """The rows were not trained on, so that scores on them mean something."""
    logits: Tensor
    """At the first trained tokens, (tokens, vocabulary)."""
    score: Score


class MergeCheck:
    """What is known of a merge, from the reference to the files.

    Its life: `measure_reference` once, then `choose` where the base is to be found, then
    `check_files`. Without a reference `check_files` does nothing, and no model is loaded at all.

    Args:
        folder: of a finished run.
        recipe: of that run.
        source: its adapter and base, as training computed.
        rule: what models compute in here.
        tokenizer: the one of training.
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
        """Everything that was told, in order."""
        self.table: list[MergeRow] = []
        """The scored candidates; empty if the base was named or no rows are held out."""
        self.exact: Agreement | None = None
        """Of the reference with the merged weights before they are rounded; fp32 runs only."""
        self.written: Agreement | None = None
        """Of the reference with the files, read back by transformers."""
        self._measured: _Reference | None = None

    def note(self, text: str) -> None:
        """Tell it now, and keep it for the card."""
        self.notes.append(text)
        self.watcher.note(text)

    def measure_reference(self) -> None:
        """Score the adapter on its base and keep some of its logits."""
        if self.rule.compute != self.source.rule.compute:
            self.note(
                f"trained in {devices.NAMES[self.source.rule.compute]} and scored here in "
                f"{devices.NAMES[self.rule.compute]}: scores differ a little from the run's own"
            )
        batches, is_heldout = self._rows()
        trained = load_run(self.folder.path, str(self.rule.device), self.watcher)
        logits = sample_logits(trained.causal, batches)
        self._measured = _Reference(batches, is_heldout, logits, score(trained.causal, batches))
        del trained
        _free()

    def choose(self, dtype: torch.dtype | None) -> BaseOfMerge:
        """The base on which the merged model scores best; the trained one on a tie.

        Args:
            dtype: of the weights that will be written; None for those of the base.
        """
        if self._is_fp32:
            self._check_before_rounding()
        bases = self.source.bases
        if not self._reference.is_heldout:
            self.note("no rows are held out, so nothing was scored: the base is the trained one")
            return "trained"
        scores = {base: self._score_candidate(base, dtype) for base in bases}
        best = min(bases, key=lambda base: scores[base].loss)
        trained = self._reference.score
        self.table.append(MergeRow("adapter on its base", trained.loss, None, False))
        for base, found in scores.items():
            agreement = found.agreement(trained)
            self.table.append(MergeRow(LABELS[base], found.loss, agreement, base == best))
        return best

    def check_files(self, directory: Path, weights: MergedWeights) -> None:
        """Compare what transformers reads from the files with the reference, if there is one."""
        if self._measured is None:
            return
        model = read_back(directory, self.source.base, self.rule)
        found = compare(self._reference.logits, sample_logits(model, self._reference.batches))
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

    def _check_before_rounding(self) -> None:
        """Before rounding, merged weights on the trained base are the trained function."""
        weights = MergedWeights(TrainedLayers(self.source, "trained"), torch.float32)
        model = candidate(weights, self.source.base, self.rule)
        found = compare(self._reference.logits, sample_logits(model, self._reference.batches))
        self.exact = found
        del model
        _free()
        assert found.is_exact, f"the merged model differs from the trained one: {found}"
        self.note(
            "before rounding, the merged weights on the base as trained give the trained model's "
            f"logits to {found.relative_error:.1e} of the largest one"
        )

    def _score_candidate(self, base: BaseOfMerge, dtype: torch.dtype | None) -> Score:
        weights = MergedWeights(TrainedLayers(self.source, base), dtype)
        model = candidate(weights, self.source.base, self.rule)
        found = score(model, self._reference.batches)
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
        return list(evaluation_batches(few, max_tokens=longest, micro_batch_tokens=longest)), False

    @property
    def _is_fp32(self) -> bool:
        """Training computed in fp32, and so does this machine."""
        return {self.rule.compute, self.source.rule.compute} == {torch.float32}

    @property
    def _reference(self) -> _Reference:
        assert self._measured is not None, "measure_reference comes first"
        return self._measured


def _free() -> None:
    """Give the memory of a model that is gone back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
