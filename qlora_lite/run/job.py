"""What the training loop works with: batches, optimizer, engine and scorer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_lite.adapters.attach import AttachedAdapter
from qlora_lite.adapters.warm_start import describe_warm_start, warm_start
from qlora_lite.data.batches import Batches, evaluation_batches, share_of
from qlora_lite.data.collate import Batch
from qlora_lite.data.examples import Examples
from qlora_lite.data.load import PreparedData
from qlora_lite.data.preview import preview_row
from qlora_lite.data.token_display import bracketed
from qlora_lite.evaluation.perplexity import score
from qlora_lite.foundation.errors import BaseModelError, RecipeError
from qlora_lite.foundation.processes import Processes, current
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.memory import formulas
from qlora_lite.memory.allocator import reuse_freed_memory, trimmer
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.checkpointing import before_each_layer, enable_checkpointing
from qlora_lite.model.probes import probe
from qlora_lite.offload.settings import NoOffload
from qlora_lite.offload.zero import configuration
from qlora_lite.recipe import Recipe
from qlora_lite.run.loading import LoadedModel
from qlora_lite.run.setup import RunSetup
from qlora_lite.run.tracking import Track
from qlora_lite.training.engine import Engine, TorchEngine
from qlora_lite.training.interruption import StopRequest
from qlora_lite.training.loop import TrainingJob
from qlora_lite.training.optimizer import AdamW
from qlora_lite.training.scorings import Scorings, choose_scorings

ROWS_SHOWN = 3
"""Rows of a batch that an error message shows."""


def training_batches(
    recipe: Recipe, data: PreparedData, micro_batch_tokens: int, packs: bool, world: int = 1
) -> Batches:
    """The batches of every step, of all processes.

    Args:
        packs: rows that share a bin do not see each other in this model.
        world: number of processes. The rows of a step do not depend on it.

    Raises:
        RecipeError: if the warm-up is longer than the run.
    """
    if world > 1:  # every process has a batch
        bins = round(recipe.optim.tokens_per_step / recipe.data.max_tokens)
        largest = max(1, bins // world) * recipe.data.max_tokens
        micro_batch_tokens = min(micro_batch_tokens, largest)
    batches = Batches(
        data.train,
        max_tokens=recipe.data.max_tokens,
        tokens_per_step=recipe.optim.tokens_per_step,
        micro_batch_tokens=micro_batch_tokens,
        seed=recipe.seed,
        packing=recipe.data.packing and packs,
        shuffle=recipe.data.shuffle,
        epochs=recipe.optim.epochs,
        steps=recipe.optim.steps,
    )
    try:
        recipe.optim.require_warmup_within(batches.steps)
    except ValueError as error:
        raise RecipeError(f"optim: {error}") from None
    return batches


def held_out_batches(recipe: Recipe, rows: Examples, packs: bool) -> Iterator[Batch]:
    """Every row once; `packs` as for `training_batches`."""
    return evaluation_batches(
        rows,
        max_tokens=recipe.data.max_tokens,
        micro_batch_tokens=recipe.optim.micro_batch_tokens or recipe.data.max_tokens,
        packing=recipe.data.packing and packs,
    )


def scorings_of(recipe: Recipe, data: PreparedData, steps: int, num_rows: int | None) -> Scorings:
    """When held-out rows are scored, and which; `num_rows` of an earlier process of this run."""
    return choose_scorings(
        recipe.evaluation,
        data.heldout.lengths,
        steps=steps,
        tokens_per_step=recipe.optim.tokens_per_step,
        checkpointing=recipe.optim.checkpointing,
        num_rows=num_rows,
    )


def require_known_tokens(data: PreparedData, setup: RunSetup) -> None:
    """Check that every token id of the rows is below the size of the base's embedding.

    Raises:
        BaseModelError: if the tokenizer has more tokens than the base.
    """
    vocabulary, model = setup.facts.vocabulary, setup.recipe.base.model
    for examples in (data.train, data.heldout):
        if len(examples) and (largest := int(examples.ids.max())) >= vocabulary:
            token = data.template.tokenizer.convert_ids_to_tokens(largest)
            raise BaseModelError(
                f"the rows contain token {largest} ({token!r}), but {model} has tokens 0 to "
                f"{vocabulary - 1}: its tokenizer belongs to another model. Restore the tokenizer "
                "that came with the weights"
            )


def make_job(
    setup: RunSetup,
    loaded: LoadedModel,
    data: PreparedData,
    batches: Batches,
    scorings: Scorings,
    *,
    directory: Path,
    origin: dict[str, Any],
    resume_from: Path | None,
    stop_request: StopRequest,
    watcher: Watcher,
    track: Track,
    require_folder: Callable[[], None],
) -> TrainingJob:
    """The model with its adapter, optimizer and data, ready for the first step."""
    recipe, attached = setup.recipe, loaded.attached
    assert attached is not None
    if recipe.adapter.start and resume_from is None:
        start = Path(recipe.adapter.start)
        for note in describe_warm_start(start, recipe.adapter, recipe.base.model):
            watcher.note(note)
        warm_start(attached, start)
    model = loaded.causal
    if setup.rule.device.type == "cpu":
        _reuse_activations(model, setup, batches)
    if recipe.optim.checkpointing:
        enable_checkpointing(loaded.base.model)
    attached.train()
    scored = data.heldout.select(scorings.rows)

    processes = current()
    engine = make_engine(setup, loaded, processes)

    def score_heldout() -> dict[str, float]:
        attached.train(False)
        all_batches = list(held_out_batches(recipe, scored, loaded.packs))
        mine = share_of(all_batches, processes)
        result = engine.forward(lambda: score(model, mine, processes.sum))
        attached.train()
        return {"loss": result.loss, "accuracy": result.accuracy, "perplexity": result.perplexity}

    def show_rows(batch: Batch) -> str:
        rows = set(batch.rows[:ROWS_SHOWN])
        examples = [example for example in data.train if example.row in rows]
        shown = [preview_row(e, data.train_source, loaded.tokenizer) for e in examples]
        return "\n".join(f"{row.where}: {bracketed(row.pieces)}" for row in shown)

    return TrainingJob(
        model=model,
        attached=attached,
        engine=engine,
        batches=batches,
        optim=recipe.optim,
        seed=recipe.seed,
        directory=directory,
        vocabulary=setup.facts.vocabulary,
        evaluation=recipe.evaluation,
        checkpoints=recipe.checkpoints,
        score=score_heldout if len(data.heldout) else None,
        score_every=scorings.every,
        show_rows=show_rows,
        stop_request=stop_request,
        origin=origin,
        resume_from=resume_from,
        watcher=watcher,
        track=track,
        require_folder=require_folder,
    )


def make_engine(setup: RunSetup, loaded: LoadedModel, processes: Processes) -> Engine:
    """The engine that `offload` asks for.

    Raises:
        BaseModelError: if a base that is divided among processes fails the probes of `probes.py`.
    """
    recipe, attached = setup.recipe, loaded.attached
    assert attached is not None
    if isinstance(recipe.offload, NoOffload):
        return TorchEngine(_optimizer(setup, attached), setup.rule.compute, processes)
    from qlora_lite.training.zero_engine import ZeroEngine

    config = configuration(
        recipe.offload, recipe.optim.max_grad_norm, setup.rule.device, attached.num_parameters
    )
    model = loaded.base.model
    engine = ZeroEngine(model, attached, recipe.optim, config, processes)
    if recipe.offload.stage == 3:
        behaviour = engine.forward(
            lambda: probe(
                loaded.causal, setup.facts.vocabulary, recipe.base.model, setup.rule.compute
            )
        )
        if loaded.packs and not behaviour.packs:
            raise BaseModelError(
                f"packed rows of {recipe.base.model} see each other. Set data.packing=false"
            )
    return engine


def _reuse_activations(model: CausalModel, setup: RunSetup, batches: Batches) -> None:
    """Let malloc reuse the memory of activations (`memory/allocator.py`)."""
    shape = setup.facts.shape
    tokens = max(batches.micro_batch_tokens, setup.recipe.data.max_tokens)
    width = shape.heads * shape.head_dim
    largest = formulas.largest_activation_bytes(tokens, shape.hidden, width, shape.ff)
    if reuse_freed_memory(largest):
        freed = formulas.backward_bytes_per_token(shape.hidden, shape.ff, formulas.FP32)
        trim = trimmer(tokens * freed)
        recomputes = setup.recipe.optim.checkpointing
        before_each_layer(model.module, trim, in_backward=not recomputes)
        model.after_decoder = trim  # the loss does not reuse what the last layer left


def _optimizer(setup: RunSetup, attached: AttachedAdapter) -> AdamW:
    optim = setup.recipe.optim
    return AdamW(
        attached.groups(),
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        states=setup.rule.optimizer_states if optim.states == "auto" else optim.states,
        rounding=optim.rounding,
    )
