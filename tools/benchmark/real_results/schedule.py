"""All measurements: the base, a run per seed, and the first run merged onto both bases.

Each runs in a process of its own. A run that is killed resumes from its checkpoint.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from method_study.results import Key, Task

from qlora_lite.export.verify import read_back
from qlora_lite.foundation.device import NAMES
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.model.tokenizer import load_tokenizer
from qlora_lite.recipe import Recipe
from qlora_lite.run.computing import new_rule, rule_of_run
from qlora_lite.run.folder import RunFolder
from qlora_lite.run.loading import load_adapted, load_run
from qlora_lite.run.merging import merge
from qlora_lite.run.setup import set_up
from qlora_lite.run.training import run_recipe
from real_results.material import Material, Places, assignments, command, recipe_of
from real_results.questions import SEED, Question, choose_questions
from real_results.scoring import score_model

METHOD = "lora"
BASES: tuple[Literal["trained", "original"], ...] = ("trained", "original")


@dataclass(frozen=True)
class Study:
    """What is measured, and how."""

    places: Places
    materials: Sequence[Material]
    seeds: int
    compute: str
    threads: int
    is_short: bool
    """Fewer steps or questions than planned: a trial of the tool."""

    def words(self, material: Material, seed: int) -> list[str]:
        """The assignments of a run."""
        return assignments(material, material.steps, seed, self.compute)

    def recipe(self, material: Material, seed: int) -> Recipe:
        output = self.places.work / f"{material.name}-{seed}"
        return recipe_of(self.words(material, seed), self.places, output)

    def settings(self, material: Material, seed: int) -> dict[str, Any]:
        """What a result depends on, besides the files of the data sets."""
        return {
            "model": self.places.model.name,
            "assignments": self.words(material, seed),
            "command": command(self.words(material, seed)),
            "questions": material.num_questions,
            "questions_seed": SEED,
            "answer_tokens": material.answer_tokens,
            "threads": self.threads,
            "is_short": self.is_short,
        }


def shortened(material: Material, steps: int | None, num_questions: int | None) -> Material:
    """A material with at most so many steps and questions."""
    return replace(
        material,
        steps=min(material.steps, steps or material.steps),
        num_questions=min(material.num_questions, num_questions or material.num_questions),
    )


def stages(study: Study) -> list[list[Task]]:
    """Bases and runs, then what is made of the first runs."""
    first: list[Task] = []
    then: list[Task] = []
    for material in study.materials:
        first.append(_task(study, material, "base", 0, score_base))
        first += [_task(study, material, "run", seed, train) for seed in range(study.seeds)]
        for base in BASES:
            then.append(_task(study, material, f"merged-{base}", 0, partial(score_merged, base)))
    return [first, then]


Measure = Callable[[Recipe, Material, list[Question]], dict[str, Any]]


def _task(study: Study, material: Material, kind: str, seed: int, measure: Measure) -> Task:
    return Task(
        Key(kind, METHOD, material.name, seed),
        study.settings(material, seed),
        partial(_measure, study, material, seed, measure),
    )


def _measure(study: Study, material: Material, seed: int, measure: Measure) -> dict[str, Any]:
    """Measure, and count the CPU time of this process."""
    recipe = study.recipe(material, seed)
    heldout = study.places.expand(material.heldout)
    questions = choose_questions(recipe.data, heldout, material.num_questions)
    start = cpu_seconds()
    values = measure(recipe, material, questions)
    return {**values, "cpu_seconds": cpu_seconds() - start}


def score_base(recipe: Recipe, material: Material, questions: list[Question]) -> dict[str, Any]:
    """The quantised base without an adapter."""
    setup = set_up(recipe, new_rule(recipe))
    loaded = load_adapted(setup, load_tokenizer(recipe.base), Watcher())
    assert loaded.attached is not None
    with loaded.attached.disabled():
        scores = score_model(loaded.causal, loaded.tokenizer, material, questions)
    return scores | {"compute": NAMES[setup.rule.compute]}


def train(recipe: Recipe, material: Material, questions: list[Question]) -> dict[str, Any]:
    """Train or resume, then score the adapter on its base."""
    folder = RunFolder(Path(recipe.output))
    is_resumed = folder.recipe.is_file()
    start = cpu_seconds()
    run_recipe(recipe)
    spent = cpu_seconds() - start
    loaded = load_run(folder.path)
    scores = score_model(loaded.causal, loaded.tokenizer, material, questions)
    assert loaded.attached is not None
    sidecar = folder.read_sidecar()
    shown = ("steps", "tokens", "seconds", "peak_bytes", "predicted_peak_bytes")
    training = {name: sidecar[name] for name in shown}
    training["trained_parameters"] = loaded.attached.num_parameters
    # the time of a killed attempt is lost
    training["cpu_seconds"] = None if is_resumed else spent
    return {**scores, "compute": sidecar["base"]["compute"], "training": training}


def score_merged(
    base: Literal["trained", "original"],
    recipe: Recipe,
    material: Material,
    questions: list[Question],
) -> dict[str, Any]:
    """A run merged to bf16, as plain transformers loads the files."""
    out = Path(f"{recipe.output}-merged-{base}")
    merge(recipe.output, out, base=base, dtype="bf16", verify=False)
    rule = rule_of_run(recipe, RunFolder(Path(recipe.output)))
    model = read_back(out, recipe.base, rule)
    tokenizer = load_tokenizer(recipe.base.model_copy(update={"model": str(out)}))
    scores = score_model(model, tokenizer, material, questions)
    shutil.rmtree(out)
    return scores | {"compute": NAMES[rule.compute]}


def cpu_seconds() -> float:
    """User and system seconds of this process."""
    times = os.times()
    return times.user + times.system
