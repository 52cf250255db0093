"""A run's folder: what it records, who may use it, and whether it is finished.

    recipe.json  metrics.jsonl  checkpoints/  adapter/  report.html

Nothing in it is ever overwritten silently.
"""

import contextlib
import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_lite.adapters.files import SIDECAR
from qlora_lite.foundation.errors import RecipeError, RunError
from qlora_lite.foundation.files import make_folder, read_object, write_json
from qlora_lite.foundation.overrides import validate
from qlora_lite.model.load import locate
from qlora_lite.model.settings import Base
from qlora_lite.recipe import FREE_SETTINGS, Recipe, differences
from qlora_lite.shards.reader import Checkpoint
from qlora_lite.training import checkpoint

_PACKAGES = ("qlora-lite", "torch", "transformers", "bitsandbytes", "accelerate", "datasets")
_RECORDED = ("recipe", "fingerprints", "micro_batch_tokens")
"""Of `recipe.json`, without which a run does not go on."""
_LENGTH = ("optim.steps", "optim.epochs")
"""The settings that `extend` may change."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the rules about them."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def make(self) -> None:
        """Create it.

        Raises:
            RunError: if there cannot be a folder of this name.
        """
        make_folder(self.path)

    def read_record(self) -> dict[str, Any]:
        """What `recipe.json` says.

        Raises:
            RunError: if this is not a run's folder.
        """
        if not self.recipe.is_file():
            raise RunError(
                f"{self.path} is not a run: it has no recipe.json. Give the folder that "
                "`qlora-lite train` wrote (its `output`)"
            )
        try:
            return read_object(self.recipe, *_RECORDED)
        except ValueError as error:
            raise RunError(
                f"{self.recipe} is damaged ({error}). Restore it, or train anew"
            ) from None

    def read_sidecar(self) -> dict[str, Any]:
        """What `adapter/qlora_lite.json` says about the trained adapter.

        Raises:
            RunError: if the run has no adapter yet.
        """
        if not (self.adapter / SIDECAR).is_file():
            raise RunError(
                f"{self.path} has no adapter yet: the run is not finished. "
                f"Run `qlora-lite train {self.path}` to go on"
            )
        try:
            return read_object(self.adapter / SIDECAR, "recipe", "base", "scores")
        except ValueError as error:
            raise RunError(
                f"{self.adapter / SIDECAR} is damaged ({error}). Restore it, or delete "
                f"{self.adapter} and train the run again: it goes on from its last checkpoint"
            ) from None

    def require_base(self, base: Base) -> Path:
        """Where the base is that this run was trained on.

        Raises:
            RunError: if its files are not what they were.
        """
        path = locate(base)
        if Checkpoint.open(path).fingerprint != self.read_sidecar()["base"]["fingerprint"]:
            raise RunError(
                f"the base {base.model} is not the one that {self.path} was trained on: its files "
                "changed. Restore them; an adapter is right on its own base only"
            )
        return path

    def is_finished(self, recipe: Recipe) -> bool:
        """The adapter is there and was trained to the end by this recipe."""
        if not (self.adapter / SIDECAR).is_file():
            return False
        return not _changes(self.read_sidecar()["recipe"], recipe)

    def unfinished_extension(self) -> list[str]:
        """A note if the adapter here is that of a shorter run, which was begun to be longer."""
        sidecar = self.read_sidecar()
        recorded = validate(Recipe, self.read_record()["recipe"])
        if not _changes(sidecar["recipe"], recorded):
            return []
        return [
            f"the adapter of {self.path} is that of step {sidecar['steps']}: its extension is not "
            f"finished. `qlora-lite train {self.path}` goes on"
        ]

    def claim(self, recipe: Recipe, extend: bool) -> None:
        """Check that `recipe` may work here, before anything is loaded.

        Raises:
            RunError: if the folder belongs to another recipe, or is something else.
        """
        if not self.recipe.exists():
            if extend:
                raise RunError(
                    f"{self.path} holds no run to extend. Leave out --extend to train a new one"
                )
            self._refuse_foreign_content()
            return
        changed = _changes(self.read_record()["recipe"], recipe)
        if (self.adapter / SIDECAR).is_file():
            was = _changes(self.read_sidecar()["recipe"], recipe)
            changed += [line for line in was if line.partition(":")[0] not in _LENGTH]
            changed = list(dict.fromkeys(changed))
        if not extend:
            if changed and not self.is_untouched:
                raise RunError(
                    f"{self.path} belongs to a run with another recipe:\n  "
                    + "\n  ".join(changed)
                    + "\nGive another output=..., or the settings that it has"
                    + _extend_hint(changed)
                )
            return
        forbidden = [line for line in changed if line.partition(":")[0] not in _LENGTH]
        if forbidden:
            raise RunError(
                "--extend only changes how long a run is (optim.steps, optim.epochs); these "
                "differ too:\n  " + "\n  ".join(forbidden) + "\nGive another output=..."
            )
        if self.adapter.exists() and checkpoint.newest(self.checkpoints) is None:
            raise RunError(
                f"{self.path} has no checkpoint left to go on from. Begin another run from its "
                f"adapter: adapter.start={self.adapter} output=..."
            )
        if not changed and self.is_finished(recipe):
            raise RunError(
                f"{self.path} is finished, and --extend was given without a new length. "
                "Say how long it should be in all: optim.steps=... or optim.epochs=..."
            )

    @property
    def is_untouched(self) -> bool:
        """Nothing is saved here: the recorded recipe came to nothing, and may be corrected."""
        return not self.adapter.exists() and checkpoint.newest(self.checkpoints) is None

    def forget_failed_start(self, recipe: Recipe) -> None:
        """Give up the record of another recipe that came to nothing here."""
        if not self.recipe.exists() or not self.is_untouched:
            return
        if _changes(self.read_record()["recipe"], recipe):
            self.recipe.unlink()

    @property
    def micro_batch_tokens(self) -> int | None:
        """What the plan chose when the run began. A resumed run keeps it, whatever is free now:
        another split of a step would round otherwise."""
        return self.read_record()["micro_batch_tokens"] if self.recipe.exists() else None

    def require_longer(self, steps: int) -> None:
        """A run cannot become shorter than it is.

        Raises:
            RunError: if more than `steps` steps are done.
        """
        found = checkpoint.newest(self.checkpoints)
        if found and checkpoint.step_of(found) > steps:
            raise RunError(
                f"{self.path} has {checkpoint.step_of(found)} steps done already, and {steps} are "
                "asked for. Give a larger optim.steps or optim.epochs"
            )

    def record(
        self,
        recipe: Recipe,
        fingerprints: dict[str, str],
        device: str,
        micro_batch_tokens: int,
    ) -> list[str]:
        """Write `recipe.json`, or compare with what is there. Returns warnings.

        The conditions under which a run began stay recorded; only its length may be changed.

        Raises:
            RunError: if data or base are not what they were when the run began.
        """
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        record = {
            "recipe": recipe.to_dict(),
            "fingerprints": fingerprints,
            "versions": versions | {"python": platform.python_version()},
            "threads": torch.get_num_threads(),
            "device": device,
            "git_revision": git_revision(),
            "micro_batch_tokens": micro_batch_tokens,
        }
        warnings: list[str] = []
        if self.recipe.exists():
            old = self.read_record()
            for what, value in fingerprints.items():
                if old["fingerprints"].get(what) != value:
                    raise RunError(
                        f"the {what} of {self.path} changed since the run began. Restore it, or "
                        "begin a new run with another output=..."
                    )
            was = {k: old.get(k) for k in ("versions", "threads", "device")}
            now = {k: record[k] for k in was}
            if changed := differences(was, now):
                warnings.append(
                    "the run began under other conditions, so it will not be bit-equal to an "
                    "uninterrupted one: " + "; ".join(changed)
                )
            record = old | {"recipe": recipe.to_dict()}
        write_json(self.recipe, record)
        return warnings

    def _refuse_foreign_content(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunError(
                f"{self.path} is a file; output must be a folder. Give another output=..."
            )
        ours = {".lock", "checkpoints", "metrics.jsonl"}
        others = [
            entry.name
            for entry in self.path.iterdir()
            if entry.name not in ours and not entry.name.endswith(".writing")
        ]
        if others:
            raise RunError(
                f"{self.path} is not empty (there is {others[0]}) and is not a run. "
                "Nothing is overwritten: give another output=..."
            )


def _changes(recorded: dict[str, Any], recipe: Recipe) -> list[str]:
    """Differences that would change a result. A setting that is newer than the record had its
    default then."""
    with contextlib.suppress(RecipeError):  # a record of another version is compared as it is
        recorded = validate(Recipe, recorded).to_dict()
    changed = differences(recorded, recipe.to_dict())
    return [line for line in changed if not _is_free(line.partition(":")[0])]


def _is_free(path: str) -> bool:
    return any(path == free or path.startswith(f"{free}.") for free in FREE_SETTINGS)


def _extend_hint(changed: list[str]) -> str:
    if all(line.partition(":")[0] in _LENGTH for line in changed):
        return ", or add --extend to train this run longer"
    return ""


def git_revision() -> str | None:
    """Of the working directory's repository, if there is one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
