"""All measurements, in stages; a stage may need the results of the stages before it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from method_study import cost, rates
from method_study.budget import Budget, recipe_of, settings_of
from method_study.contenders import REFERENCE, Contender, extras
from method_study.material import EMBEDDED, Material
from method_study.ranks import losses_by_rank
from method_study.results import Key, Results, Task, Values
from method_study.training import train
from qlora_lite.data.load import load_data
from qlora_lite.demo import BASE
from qlora_lite.evaluation.perplexity import score
from qlora_lite.model.quant import FP32
from qlora_lite.model.tokenizer import load_tokenizer
from qlora_lite.run.job import held_out_batches
from qlora_lite.run.loading import load_model


@dataclass(frozen=True)
class Study:
    """The parts of the study."""

    work: Path
    budget: Budget
    materials: Sequence[Material]
    contenders: Sequence[Contender]
    results: Results

    def rate(self, contender: Contender) -> float:
        """The learning rate of its method, chosen at rank 8."""
        return rates.best_rate(self.results, contender.kind)

    def run_folder(self, name: str, material: Material, seed: int) -> Path:
        return self.work / material.name / f"{name}-seed{seed}"


@dataclass(frozen=True)
class Stage:
    """Independent measurements."""

    name: str
    tasks: Sequence[Task]
    is_timed: bool = False
    """Measures time: run one at a time, on all cores."""


def stages(study: Study) -> Iterator[Stage]:
    """All stages of a study; each is created when the one before it is done.

    Extra runs of claims use the embedded rows only.
    """
    yield Stage("rates", list(_rates(study)))
    yield Stage("costs", list(_costs(study)), is_timed=True)
    more = extras(study.contenders)
    runs: list[Task] = []
    for seed in range(study.budget.seeds):
        for material in study.materials:
            runs += [_run(study, c, material, seed) for c in study.contenders]
        runs += [_run(study, extra, EMBEDDED, seed) for extra in more]
        runs += _unquantised(study, seed)
    yield Stage("runs", runs)
    yield Stage(
        "ranks", [task for seed in range(study.budget.seeds) for task in _truncations(study, seed)]
    )


def _rates(study: Study) -> Iterator[Task]:
    for contender in study.contenders:
        for lr in rates.rates_of(contender.kind):
            output = study.work / "rates" / f"{contender.name}-{lr:g}"
            recipe = recipe_of(contender, EMBEDDED, study.budget.steps, rates.SEED, lr, output).but(
                *rates.SET_ASIDE
            )
            key = rates.rate_key(contender.kind, lr)
            yield Task(key, settings_of(recipe), partial(train, recipe))


def _costs(study: Study) -> Iterator[Task]:
    reference = next(c for c in study.contenders if c.name == REFERENCE)
    for contender in study.contenders:
        ours, theirs = (
            recipe_of(c, EMBEDDED, cost.PAIRS + 1, 0, study.rate(c), study.work).but(
                "optim.checkpointing=true"
            )
            for c in (contender, reference)
        )
        key = Key("cost", contender.name, EMBEDDED.name)
        yield Task(key, settings_of(ours), partial(cost.cost, ours, theirs))


def _run(study: Study, contender: Contender, material: Material, seed: int) -> Task:
    output = study.run_folder(contender.name, material, seed)
    recipe = recipe_of(contender, material, study.budget.steps, seed, study.rate(contender), output)
    key = Key("run", contender.name, material.name, seed)
    return Task(key, settings_of(recipe), partial(train, recipe))


def _truncations(study: Study, seed: int) -> Iterator[Task]:
    """DyLoRA and LoRA truncated to every rank."""
    names = [contender.name for contender in study.contenders]
    if "dylora" not in names:
        return
    for name in ("dylora", REFERENCE):
        run = _run(study, study.contenders[names.index(name)], EMBEDDED, seed)
        folder = study.run_folder(name, EMBEDDED, seed)
        key = Key("ranks", name, EMBEDDED.name, seed)
        yield Task(key, run.settings, partial(losses_by_rank, folder))


def _unquantised(study: Study, seed: int) -> Iterator[Task]:
    """The base before quantisation, for the claim of LoftQ."""
    if not any(contender.name == "loftq" for contender in study.contenders):
        return
    for material in study.materials:
        key = Key("run", "unquantised", material.name, seed)
        yield Task(key, {}, partial(_score_unquantised, material, seed))


def _score_unquantised(material: Material, seed: int) -> Values:
    plain = Contender(REFERENCE, REFERENCE)
    recipe = recipe_of(plain, material, 1, seed, 1.0, Path("unused"))
    data = load_data(recipe.data, load_tokenizer(recipe.base), seed)
    model = load_model(BASE, FP32(), device=recipe.device)
    return {"start": score(model.causal, held_out_batches(recipe, data.heldout, model.packs)).loss}
