"""The end of a run: samples before and after, the report, and the adapter files.

The adapter's directory is written last and atomically: a run with an `adapter/` is finished.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.files import save_adapter
from qlora_lite.data.examples import Example
from qlora_lite.data.load import PreparedData
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.evaluation.generation import answers
from qlora_lite.export.directory import save_tokenizer
from qlora_lite.foundation.device import NAMES
from qlora_lite.foundation.files import complete_directory
from qlora_lite.foundation.units import format_seconds
from qlora_lite.memory.measure import peak_bytes
from qlora_lite.memory.plan import Plan
from qlora_lite.model.base_files import BaseFiles
from qlora_lite.recipe import Recipe
from qlora_lite.report.contents import Report, Sample
from qlora_lite.report.page import write as write_report
from qlora_lite.run.folder import RunFolder, git_revision
from qlora_lite.run.loading import LoadedModel
from qlora_lite.shards.checkpoint import Checkpoint
from qlora_lite.training import metrics
from qlora_lite.training.engine import Engine
from qlora_lite.training.loop import Progress

SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class FinishedTraining:
    """What is known after the last step."""

    recipe: Recipe
    folder: RunFolder
    loaded: LoadedModel
    attached: AttachedAdapter
    data: PreparedData
    plan: Plan
    progress: Progress
    keeps_best: bool
    """Early stopping is on."""
    require_folder: Callable[[], None]
    """Raises RunError if the run's folder was taken away."""
    engine: Engine

    @property
    def saved_step(self) -> int:
        """The step whose adapter is saved: the last, or with early stopping the best."""
        return self.progress.best_step if self.keeps_best else self.progress.step


@dataclass(frozen=True)
class RunOutcome:
    """The results of a run."""

    scores: dict[str, float]
    """Held-out `loss_before` (before the first step) and `loss`; empty without held-out rows."""
    samples: tuple[Sample, ...]
    peak_bytes: int


def finish(finished: FinishedTraining) -> RunOutcome:
    """Write `report.html`, then `adapter/`. Every process computes, and the main one writes."""
    processes = finished.engine.processes
    finished.attached.train(False)
    logged = [event.get("peak_bytes", 0) for event in metrics.read(finished.folder.metrics)]
    peak = max(
        [peak_bytes(finished.loaded.causal.device), *logged]
    )  # also of earlier starts of the run
    shown = list(finished.data.heldout)[: finished.recipe.evaluation.samples]
    samples = finished.engine.forward(lambda: _samples(finished, shown))
    outcome = RunOutcome(_scores(finished), samples, peak)
    if not processes.is_main:
        with TemporaryDirectory() as unused:  # layers whose base is divided are read by all
            save_adapter(Path(unused), finished.attached, base="", revision=None, sidecar={})
        return outcome
    sidecar = _sidecar(finished, outcome)
    finished.require_folder()
    write_report(finished.folder.report, _report(finished, outcome))
    with complete_directory(finished.folder.adapter) as temporary:
        save_tokenizer(finished.loaded.tokenizer, temporary)
        save_adapter(
            temporary,
            finished.attached,
            base=finished.recipe.base.model,
            revision=finished.recipe.base.revision,
            sidecar=sidecar,
            readme=_how_to_load(finished.loaded.base.files),
        )
    return outcome


def _how_to_load(base: BaseFiles) -> str | None:
    """The adapter's README.md if its base is a GGUF file: transformers needs both of its names."""
    if not base.is_gguf:
        return None
    folder, name = str(base.weights.parent), base.weights.name
    return f"""The base of this adapter is a GGUF file, which `peft` does not find by itself:

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder, file = {folder!r}, {name!r}
base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
model = PeftModel.from_pretrained(base, "THIS FOLDER")
```

`qlora-lite merge RUN OUT` writes a model that needs no GGUF file.
"""


def _scores(finished: FinishedTraining) -> dict[str, float]:
    """Held-out loss before the first step (usually that of the base), and of the saved adapter."""
    progress = finished.progress
    loss = progress.best_loss if finished.keeps_best else progress.last_loss
    if progress.first_loss is None or loss is None:
        return {}
    return {"loss_before": progress.first_loss, "loss": loss}


def _samples(finished: FinishedTraining, examples: Sequence[Example]) -> tuple[Sample, ...]:
    """The answers of the base and of the adapted model to held-out prompts."""
    model, tokenizer = finished.loaded.base.model, finished.loaded.tokenizer
    template = ChatTemplate(tokenizer)
    stop_ids = list(dict.fromkeys([template.end_of_turn_id, tokenizer.eos_token_id]))
    parts = [_prompt_and_answer(example) for example in examples]
    prompts = [prompt for prompt, _ in parts]

    def generate() -> list[str]:
        return answers(model, tokenizer, prompts, stop_ids, SAMPLE_TOKENS)

    def text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    if finished.attached.is_base_unchanged:
        with finished.attached.disabled():
            before = generate()
    else:
        before = ["(not available: this method changed the base weights)"] * len(parts)
    return tuple(
        Sample(text(prompt), bare, adapted, text(expected))
        for (prompt, expected), bare, adapted in zip(parts, before, generate(), strict=True)
    )


def _prompt_and_answer(example: Example) -> tuple[list[int], list[int]]:
    """The ids up to the first answer, and those of the answer; plain text is cut in the middle."""
    ids, mask = example.ids.tolist(), example.loss_mask.tolist()
    answer_starts = mask.index(True)
    first = answer_starts if answer_starts > 1 else max(1, len(ids) // 2)
    stop = next((i for i in range(first, len(mask)) if not mask[i]), len(mask))
    return ids[:first], ids[first:stop]


def _sidecar(finished: FinishedTraining, outcome: RunOutcome) -> dict[str, Any]:
    """What the PEFT format does not record."""
    base = finished.loaded.base
    return {
        "recipe": finished.recipe.to_dict(),
        "adapter": finished.recipe.adapter.model_dump(mode="json"),
        "base": {
            "model": finished.recipe.base.model,
            "revision": finished.recipe.base.revision,
            "quant": base.quant.model_dump(mode="json"),
            "compute": NAMES[base.rule.compute],
            "storage": NAMES[base.rule.storage],
            "norms": NAMES[base.rule.norms],
            "fingerprint": base.checkpoint.fingerprint,
            "sha256": _full_hash(base.checkpoint),
        },
        "data": finished.data.fingerprints,
        "data_fingerprint": finished.data.fingerprint,
        "steps": finished.saved_step,
        "state": "best" if finished.keeps_best else "last",
        "tokens": finished.progress.tokens,
        "seconds": finished.progress.seconds,
        "scores": outcome.scores,
        "predicted_peak_bytes": finished.plan.ledger.measured_bytes,
        "peak_bytes": outcome.peak_bytes,
        "versions": finished.folder.read_record()["versions"],
    }


def _full_hash(base: Checkpoint) -> str | None:
    """Hash of every byte of the base; None if its files are gone."""
    try:
        return base.full_hash
    except OSError:
        return None


def _report(finished: FinishedTraining, outcome: RunOutcome) -> Report:
    record = finished.folder.read_record()
    which = "best" if finished.keeps_best else "last"
    facts = {
        "device": finished.loaded.base.rule.summary,
        "steps": (
            f"{finished.progress.step} (the saved adapter is from step {finished.saved_step}, "
            f"the {which})"
        ),
        "tokens": f"{finished.progress.tokens:,}",
        "training time": format_seconds(finished.progress.seconds),
        "trained parameters": f"{finished.attached.num_parameters:,}",
        "rows": f"{len(finished.data.train):,} trained, {len(finished.data.heldout):,} held out",
        "git revision": git_revision() or "none",
    }
    facts |= {f"version of {name}": version for name, version in record["versions"].items()}
    terms = [(name, num_bytes, None) for name, num_bytes, _ in finished.plan.rows()]
    return Report(
        title=finished.folder.path.name,
        recipe=finished.recipe.to_dict(),
        metrics=metrics.read(finished.folder.metrics),
        facts=facts,
        memory=[("peak", finished.plan.ledger.measured_bytes, outcome.peak_bytes), *terms],
        samples=outcome.samples,
    )
