"""The end of a run: samples before and after, the report, and the adapter as files.

The adapter's directory comes last and appears whole: it is what makes a run finished.
"""

from dataclasses import dataclass
from typing import Any

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.files import save_adapter
from qlora_lite.data.examples import Example
from qlora_lite.data.load import PreparedData
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.evaluation.generation import answer
from qlora_lite.foundation.device import NAMES
from qlora_lite.foundation.files import complete_directory
from qlora_lite.foundation.units import format_seconds
from qlora_lite.memory.measure import peak_bytes
from qlora_lite.memory.plan import Plan
from qlora_lite.recipe import Recipe
from qlora_lite.report.contents import Report, Sample
from qlora_lite.report.page import write as write_report
from qlora_lite.run.folder import RunFolder, git_revision
from qlora_lite.run.loading import LoadedModel
from qlora_lite.training import metrics
from qlora_lite.training.loop import Progress

SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class FinishedTraining:
    """Everything that is known when the last step is done."""

    recipe: Recipe
    folder: RunFolder
    loaded: LoadedModel
    attached: AttachedAdapter
    data: PreparedData
    plan: Plan
    progress: Progress
    keeps_best: bool
    """Early stopping is on."""

    @property
    def kept_step(self) -> int:
        """The step whose adapter is kept: the last, or the best where early stopping is on."""
        return self.progress.best_step if self.keeps_best else self.progress.step


@dataclass(frozen=True)
class RunOutcome:
    """What a run came to."""

    scores: dict[str, float]
    """Of the held-out rows: `loss_before` (at the start) and `loss`; empty if none is held out."""
    samples: tuple[Sample, ...]
    peak_bytes: int


def finish(end: FinishedTraining) -> RunOutcome:
    """Write `report.html`, then `adapter/`."""
    end.attached.train(False)
    peak = peak_bytes(end.loaded.causal.device)
    shown = list(end.data.heldout)[: end.recipe.evaluation.samples]
    samples = tuple(_sample(end, example) for example in shown)
    outcome = RunOutcome(_scores(end), samples, peak)
    write_report(end.folder.report, _report(end, outcome))
    with complete_directory(end.folder.adapter) as aside:
        save_adapter(
            aside,
            end.attached,
            base=end.recipe.base.model,
            revision=end.recipe.base.revision,
            sidecar=_sidecar(end, outcome),
        )
    return outcome


def _scores(end: FinishedTraining) -> dict[str, float]:
    """The loss at the start, as a rule the bare base's, and the kept adapter's."""
    progress = end.progress
    kept = progress.best_loss if end.keeps_best else progress.last_loss
    if progress.first_loss is None or kept is None:
        return {}
    return {"loss_before": progress.first_loss, "loss": kept}


def _sample(end: FinishedTraining, example: Example) -> Sample:
    """The answer of the bare base and of the adapted model to one held-out prompt."""
    model, tokenizer = end.loaded.base.model, end.loaded.tokenizer
    ids, mask = example.ids.tolist(), example.loss_mask.tolist()
    answer_starts = mask.index(True)
    first = answer_starts if answer_starts > 1 else max(1, len(ids) // 2)
    stop = next((i for i in range(first, len(mask)) if not mask[i]), len(mask))
    template = ChatTemplate(tokenizer)
    ends = list(dict.fromkeys([template.end_of_turn_id, tokenizer.eos_token_id]))

    def say() -> str:
        return answer(model, tokenizer, ids[:first], ends, SAMPLE_TOKENS)

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    if end.attached.is_base_unchanged:
        with end.attached.disabled():
            before = say()
    else:
        before = "(this method changed the base's own weights: it does not answer for itself)"
    return Sample(text(ids[:first]), before, say(), text(ids[first:stop]))


def _sidecar(end: FinishedTraining, outcome: RunOutcome) -> dict[str, Any]:
    """What the PEFT format does not record."""
    base = end.loaded.base
    return {
        "recipe": end.recipe.to_dict(),
        "adapter": end.recipe.adapter.model_dump(mode="json"),
        "base": {
            "model": end.recipe.base.model,
            "revision": end.recipe.base.revision,
            "quant": base.quant.model_dump(mode="json"),
            "compute": NAMES[base.rule.compute],
            "storage": NAMES[base.rule.storage],
            "norms": NAMES[base.rule.norms],
            "fingerprint": base.checkpoint.fingerprint,
        },
        "data": end.data.fingerprints,
        "data_fingerprint": end.data.fingerprint,
        "steps": end.kept_step,
        "state": "best" if end.keeps_best else "last",
        "tokens": end.progress.tokens,
        "seconds": end.progress.seconds,
        "scores": outcome.scores,
        "predicted_peak_bytes": end.plan.ledger.measured_bytes,
        "peak_bytes": outcome.peak_bytes,
        "versions": end.folder.read_record()["versions"],
    }


def _report(end: FinishedTraining, outcome: RunOutcome) -> Report:
    record = end.folder.read_record()
    kept = "best" if end.keeps_best else "last"
    facts = {
        "device": end.loaded.base.rule.summary,
        "steps": f"{end.progress.step} (the adapter is that of step {end.kept_step}, the {kept})",
        "tokens": f"{end.progress.tokens:,}",
        "training time": format_seconds(end.progress.seconds),
        "trained parameters": f"{end.attached.num_parameters:,}",
        "rows": f"{len(end.data.train):,} trained, {len(end.data.heldout):,} held out",
        "git revision": git_revision() or "none",
    }
    facts |= {f"version of {name}": version for name, version in record["versions"].items()}
    terms = [(name, num_bytes, None) for name, num_bytes, _ in end.plan.rows()]
    return Report(
        title=end.folder.path.name,
        recipe=end.recipe.to_dict(),
        metrics=metrics.read(end.folder.metrics),
        facts=facts,
        memory=[("peak", end.plan.ledger.measured_bytes, outcome.peak_bytes), *terms],
        samples=outcome.samples,
    )
