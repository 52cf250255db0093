"""Score runs and models on rows: for a run, with the adapter and without it."""

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lite.data.batches import evaluation_batches
from qlora_lite.data.chosen_template import use_template
from qlora_lite.data.collate import Batch
from qlora_lite.data.load import load_data
from qlora_lite.data.settings import Data
from qlora_lite.data.templates import ChatTemplate
from qlora_lite.data.tokenise import tokenise
from qlora_lite.evaluation.perplexity import Score, score
from qlora_lite.foundation.errors import CheckError, DataError
from qlora_lite.foundation.overrides import apply_overrides, validate
from qlora_lite.foundation.settings import Settings
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.job import held_out_batches
from qlora_lite.run.loading import LoadedModel, load


@dataclass(frozen=True)
class ScoreRow:
    """One model's score."""

    target: str
    """The run or model, as the caller gave it."""
    what: str
    """`adapter` or `bare base` of a run, `model` otherwise."""
    score: Score


class _Rows(Settings):
    """The part of a recipe that says which rows are scored and how they are read."""

    data: Data


def score_targets(
    targets: Sequence[str],
    data: str | None = None,
    assignments: Sequence[str] = (),
    device: str = "auto",
    watcher: Watcher | None = None,
    *,
    trust_remote_code: bool = False,
) -> list[ScoreRow]:
    """Score runs and models; one is in memory at a time.

    Args:
        targets: run folders, model directories, GGUF files or hub ids.
        data: a file; all its rows are scored. Without it, the held-out rows of each run.
        assignments: how the rows of `data` are read, such as `data.fields=...`; they override the
            run's data settings.
        trust_remote_code: let the models run their own Python code.

    Raises:
        QloraLiteError: if a target or the data cannot be used.
        CheckError: if a loss is not finite.
    """
    watcher = watcher or Watcher()
    _check_arguments(targets, data, assignments)
    rows: list[ScoreRow] = []
    for target in targets:
        loaded = load(target, device, watcher, trust_remote_code=trust_remote_code)
        rows += _score(target, loaded, data, assignments, watcher)
        del loaded
        gc.collect()
    return rows


def _check_arguments(targets: Sequence[str], data: str | None, assignments: Sequence[str]) -> None:
    if data is not None:
        if unused := [text for text in assignments if "heldout" in text.partition("=")[0]]:
            raise DataError(
                f"got {' '.join(unused)}, but all rows of {data} are scored. Use data.max_rows=N "
                "for the first N rows"
            )
        return
    if assignments:
        raise DataError(
            f"got {' '.join(assignments)} without a file. Held-out rows are read with the run's "
            "own settings. Give the file that these settings are for: --data FILE"
        )
    for target in targets:
        if not (Path(target) / "recipe.json").is_file():
            problem = "is not a run" if Path(target).exists() else "does not exist here"
            raise DataError(
                f"{target} {problem}, so it has no held-out rows. "
                "Give the rows to score: --data FILE"
            )


def _score(
    target: str,
    loaded: LoadedModel,
    data: str | None,
    assignments: Sequence[str],
    watcher: Watcher,
) -> list[ScoreRow]:
    if data is None:
        batches = list(_held_out(target, loaded, watcher))
    else:
        batches = list(_of_file(loaded, data, assignments, watcher))
    if loaded.attached is None:
        return [_finite(target, "model", score(loaded.causal, batches))]
    adapter = _finite(target, "adapter", score(loaded.causal, batches))
    if not loaded.attached.is_base_unchanged:
        return [adapter]
    with loaded.attached.disabled():
        base = _finite(target, "bare base", score(loaded.causal, batches))
    return [base, adapter]


def _finite(target: str, what: str, score: Score) -> ScoreRow:
    """A row of the result.

    Raises:
        CheckError: if the loss is not finite.
    """
    if not math.isfinite(score.loss):
        raise CheckError(
            f"{target} ({what}): the loss is {score.loss}. Its weights are damaged, or its "
            "activations overflow. Check the files, or compute in fp32 with --device cpu"
        )
    return ScoreRow(target, what, score)


def _held_out(target: str, loaded: LoadedModel, watcher: Watcher) -> Iterator[Batch]:
    """The run's held-out rows."""
    assert loaded.recipe is not None
    recipe = loaded.recipe
    prepared = load_data(recipe.data, loaded.tokenizer, recipe.seed, watcher.reading)
    if not len(prepared.heldout):
        raise DataError(f"{target} held out no rows. Give the rows to score: --data FILE")
    if prepared.fingerprint != RunFolder(Path(target)).read_sidecar()["data_fingerprint"]:
        watcher.note(
            f"the data of {target} changed since it was trained: rows that are held out now may "
            "have been trained on"
        )
    return held_out_batches(loaded.recipe, prepared.heldout, loaded.packs)


def _of_file(
    loaded: LoadedModel, file: str, assignments: Sequence[str], watcher: Watcher
) -> Iterator[Batch]:
    """Every row of a file, read with the run's data settings and `assignments` on top."""
    values: dict[str, Any] = {"max_tokens": _context(loaded)}
    if loaded.recipe is not None:
        values = loaded.recipe.data.model_dump(mode="json", exclude_unset=True)
        values.pop("max_rows", None)
    changed, _ = apply_overrides({"data": values | {"train": file}}, assignments, _Rows)
    data = validate(_Rows, changed).data
    if data.template is not None and data.template != values.get("template"):
        use_template(loaded.tokenizer, data.template)
    template = ChatTemplate(loaded.tokenizer)
    rows = tokenise(data, data.train, template, data.max_rows, watcher.reading)
    return evaluation_batches(
        rows.examples,
        max_tokens=data.max_tokens,
        micro_batch_tokens=data.max_tokens,
        packing=data.packing and loaded.packs,
    )


def _context(loaded: LoadedModel) -> int:
    """The default `max_tokens`, but at most the model's context."""
    longest: int = Data.model_fields["max_tokens"].default
    config = loaded.base.config.get_text_config()
    return min(longest, getattr(config, "max_position_embeddings", longest))
