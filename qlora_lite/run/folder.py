"""A run's folder: what it records, who may use it, and whether it is finished.

    recipe.json  metrics.jsonl  checkpoints/  adapter/  report.html  base/ (of a GGUF file)

Nothing in it is ever overwritten silently.
"""

import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_lite.adapters.files import SIDECAR, how_to_rebuild
from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.files import make_folder, read_object
from qlora_lite.foundation.json_files import check_as
from qlora_lite.foundation.overrides import validate
from qlora_lite.foundation.sealed import is_unchanged, read_sealed, require_files, write_sealed
from qlora_lite.model.base_files import BaseFiles, files_of, find_weights, open_weights
from qlora_lite.model.settings import Base
from qlora_lite.recipe import Recipe, differences
from qlora_lite.recipe_files import CHANGED, load_recipe
from qlora_lite.run.changes import changes, edited_after_training, extend_hint, is_length
from qlora_lite.run.records import Computing, RunRecord, Sidecar
from qlora_lite.shards.checkpoint import Checkpoint
from qlora_lite.training import checkpoint

_PACKAGES = ("qlora-lite", "torch", "transformers", "bitsandbytes", "accelerate", "datasets")
FULLY_HASHED_BYTES = 4 * 10**9
"""A larger base is checked by samples when a run starts, and hashed when it ends."""


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
    def base_files(self) -> Path:
        """The converted config and tokenizer of a GGUF base."""
        return self.path / "base"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def make(self) -> None:
        """Create it.

        Raises:
            RunError: if there cannot be a folder of this name.
        """
        make_folder(self.path)

    def remove_if_unused(self) -> None:
        """Remove the folder if it has nothing but a lock: its run did not start."""
        if self.path.is_dir() and {entry.name for entry in self.path.iterdir()} <= {".lock"}:
            (self.path / ".lock").unlink(missing_ok=True)
            self.path.rmdir()

    def read_record(self) -> dict[str, Any]:
        """Read `recipe.json`.

        Raises:
            RunError: if this is not a run's folder.
        """
        if not self.recipe.is_file():
            raise RunError(
                f"{self.path} is not a run: it has no recipe.json. Give the folder that "
                "`qlora-lite train` wrote (its `output`)"
            )
        try:
            record = read_object(self.recipe)
            check_as(record, RunRecord)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.recipe} is damaged ({error}). Restore it, or train again in another folder"
            ) from None
        return record

    def read_sidecar(self) -> dict[str, Any]:
        """Read `adapter/qlora_lite.json`: how the adapter was trained.

        Raises:
            RunError: if the run has no adapter yet.
        """
        if not self.adapter.is_dir():
            raise RunError(
                f"{self.path} has no adapter yet: the run is not finished. "
                f"Continue it with `qlora-lite train {self.path}`"
            )
        if not (self.adapter / SIDECAR).is_file():
            raise RunError(
                f"{self.adapter / SIDECAR} is missing. Restore it{how_to_rebuild(self.adapter)}"
            )
        try:
            sidecar = read_sealed(self.adapter / SIDECAR)
            check_as(sidecar, Sidecar)
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.adapter / SIDECAR} is damaged ({error}). "
                f"Restore it{how_to_rebuild(self.adapter)}"
            ) from None
        return sidecar

    def trained_recipe(self, *, trust_remote_code: bool = False) -> Recipe:
        """The recipe of a run with an adapter. Paths and device may differ from those in training,
        the length too while the run is being extended.

        Args:
            trust_remote_code: let the base run its own Python code.

        Raises:
            RunError: if there is no adapter, or another setting was edited after training.
        """
        self.read_record()
        recipe = load_recipe(self.recipe, trust_remote_code=trust_remote_code)
        if edited := edited_after_training(self.read_sidecar()["recipe"], recipe):
            raise RunError(
                f"{self.recipe} was changed after its adapter was trained:\n  "
                + "\n  ".join(edited)
                + f"\nRestore the first values, with which {self.adapter} was trained"
            )
        return recipe

    def require_base(self, base: Base, *, every_byte: bool = False) -> BaseFiles:
        """The files of the base that this run was trained on.

        Args:
            every_byte: compare the hash of all bytes, not only of samples.

        Raises:
            RunError: if its files changed since then.
        """
        weights, recorded = find_weights(base), self.read_sidecar()["base"]
        checkpoint = open_weights(weights)
        is_same = checkpoint.fingerprint == recorded["fingerprint"]
        if is_same and every_byte and recorded.get("sha256"):
            is_same = checkpoint.full_hash == recorded["sha256"]
        if not is_same:
            raise RunError(
                f"the base {base.model} is not the one that {self.path} was trained on: its files "
                "changed. Restore them: an adapter only works with the base that it was trained on"
            )
        return files_of(weights, self.base_files)

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether the adapter exists and was trained to the end with this recipe."""
        if not self.adapter.is_dir():
            return False
        return not changes(self.read_sidecar()["recipe"], recipe)

    def require_intact(self) -> None:
        """Check that the adapter's files have the recorded hashes.

        Raises:
            RunError: naming a file that is missing or changed.
        """
        try:
            require_files(self.adapter, self.read_sidecar())
        except ValueError as error:
            raise RunError(
                f"{self.adapter} is damaged: {error}. Restore it{how_to_rebuild(self.adapter)}"
            ) from None

    def unfinished_extension(self) -> list[str]:
        """A note if this run is being extended and its adapter is still that of the shorter run."""
        sidecar = self.read_sidecar()
        recorded = validate(Recipe, self.read_record()["recipe"])
        if not changes(sidecar["recipe"], recorded):
            return []
        return [
            f"the adapter of {self.path} is from step {sidecar['steps']}: its extension is not "
            f"finished. Continue it with `qlora-lite train {self.path}`"
        ]

    def require_usable(self, recipe: Recipe, extend: bool) -> None:
        """Check that `recipe` may be trained here, before anything is loaded.

        Raises:
            RunError: if the folder belongs to another recipe, or is not a run's folder.
        """
        if not self.recipe.exists():
            if extend:
                raise RunError(
                    f"{self.path} has no run to extend. Leave out --extend to train a new one"
                )
            self._require_empty()
            return
        changed = changes(self.read_record()["recipe"], recipe)
        if self.adapter.is_dir():
            since_trained = changes(self.read_sidecar()["recipe"], recipe)
            changed += [line for line in since_trained if not is_length(line)]
            changed = list(dict.fromkeys(changed))
        if not extend:
            if changed and self.has_results:
                raise RunError(
                    f"{self.path} belongs to a run with another recipe:\n  "
                    + "\n  ".join(changed)
                    + "\nGive another output=..., or use the settings of that run"
                    + extend_hint(changed)
                    + self._edited_hint()
                )
            return
        forbidden = [line for line in changed if not is_length(line)]
        if forbidden:
            raise RunError(
                "--extend only changes how long a run is (optim.steps, optim.epochs), and these "
                "settings differ too:\n  " + "\n  ".join(forbidden) + "\nGive another output=..."
            )
        if self.adapter.exists() and checkpoint.newest(self.checkpoints) is None:
            raise RunError(
                f"{self.path} has no checkpoint left to continue from. Start another run from its "
                f"adapter: adapter.start={self.adapter} output=..."
            )
        is_repeated = self.read_record().get("is_extended", False)
        if not changed and not is_repeated and self.is_finished(recipe):
            raise RunError(
                f"{self.path} is finished, and --extend was given without a new length. "
                "Give the new total length: optim.steps=... or optim.epochs=..."
            )

    def _edited_hint(self) -> str:
        """The end of an error message, if `recipe.json` is not as the run wrote it."""
        return "" if is_unchanged(self.read_record()) else f". {self.recipe} {CHANGED}"

    @property
    def has_results(self) -> bool:
        """Whether a checkpoint or adapter exists. Until then the recipe may still change."""
        return self.adapter.exists() or checkpoint.newest(self.checkpoints) is not None

    def discard_unused_record(self, recipe: Recipe) -> None:
        """Delete the `recipe.json` of another recipe that left no checkpoint and no adapter."""
        if not self.recipe.exists() or self.has_results:
            return
        if changes(self.read_record()["recipe"], recipe):
            self.recipe.unlink()

    @property
    def micro_batch_tokens(self) -> int | None:
        """The micro-batch that the plan chose when the run started. A resumed run keeps it, however
        much memory is free now: another split of a step would change the rounding."""
        return self.read_record()["micro_batch_tokens"] if self.recipe.exists() else None

    @property
    def scored_rows(self) -> int | None:
        """How many held-out rows are scored during the run. A resumed or extended run scores the
        same ones: losses of other rows could not be compared."""
        return self.read_record().get("scored_rows") if self.recipe.exists() else None

    @property
    def computing(self) -> Computing | None:
        """How this run computes, or None if it has not started. Runs of earlier versions recorded
        nothing: on CPU they computed in fp32 unless `base.compute` was set."""
        if not self.recipe.exists():
            return None
        record = check_as(self.read_record(), RunRecord)
        if record.computing is None and not (record.device or "").startswith("CPU"):
            return None
        compute = record.recipe.get("base", {}).get("compute", "auto")
        earlier = Computing(device="cpu", compute="fp32" if compute == "auto" else compute)
        return record.computing or earlier

    def require_not_shorter(self, steps: int) -> None:
        """Check that the run has not already done more than `steps` steps.

        Raises:
            RunError: if more than `steps` steps are done.
        """
        found = checkpoint.newest(self.checkpoints)
        if found and checkpoint.step_of(found) > steps:
            raise RunError(
                f"{self.path} has already done {checkpoint.step_of(found)} steps, and the recipe "
                f"has {steps}. Give a larger optim.steps or optim.epochs"
            )

    def started_with(self, data: str, base: Checkpoint) -> dict[str, str]:
        """The fingerprints that the run recorded at its start; those of `data` and `base` before.
        `record` compares the two."""
        recorded = self.read_record()["fingerprints"] if self.recipe.exists() else {}
        return {"data": data, "base": base.fingerprint} | recorded

    def fingerprints(self, data: str, base: Checkpoint) -> dict[str, str]:
        """Hashes of what a run reads; those of a large base are of samples only."""
        found = {"data": data, "base": base.fingerprint}
        if base.num_bytes <= FULLY_HASHED_BYTES:
            found["base_sha256"] = base.full_hash
        return found

    def record(
        self,
        recipe: Recipe,
        fingerprints: dict[str, str],
        device: str,
        computing: Computing,
        micro_batch_tokens: int,
        scored_rows: int,
    ) -> list[str]:
        """Write `recipe.json`, or compare with the existing one. Returns warnings.

        Versions, device and threads stay those of the run's start; only its recipe is updated.

        Args:
            device: one line for the reader.

        Raises:
            RunError: if the data or the base changed since the run started.
        """
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        record = {
            "recipe": recipe.to_dict(),
            "fingerprints": fingerprints,
            "versions": versions | {"python": platform.python_version()},
            "threads": torch.get_num_threads(),
            "device": device,
            "computing": computing.model_dump(),
            "git_revision": git_revision(),
            "micro_batch_tokens": micro_batch_tokens,
            "scored_rows": scored_rows,
        }
        warnings: list[str] = []
        if self.recipe.exists():
            old = self.read_record()
            for what, value in fingerprints.items():
                if old["fingerprints"].get(what, value) != value:
                    raise RunError(
                        f"the {what.partition('_')[0]} of {self.path} changed since the run "
                        "started. Restore it, or start a new run with another output=..."
                    )
            before = {k: old.get(k) for k in ("versions", "threads", "device")}
            now = {k: record[k] for k in before}
            if changed := differences(before, now):
                warnings.append(
                    "the run started with other versions, threads or device, so it will not be "
                    "bit-identical to an uninterrupted one: " + "; ".join(changed)
                )
            record = old | {"recipe": recipe.to_dict()}
            if any(is_length(line) for line in changes(old["recipe"], recipe)):
                record["is_extended"] = True
        write_sealed(self.recipe, record, {})
        return warnings

    def _require_empty(self) -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunError(
                f"{self.path} is a file, and output must be a folder. Give another output=..."
            )
        ours = {".lock", "checkpoints", "metrics.jsonl", "base"}
        others = [
            entry.name
            for entry in self.path.iterdir()
            if entry.name not in ours and not entry.name.endswith(".writing")
        ]
        if others:
            raise RunError(
                f"{self.path} is not a run's folder and not empty (it contains {others[0]}). "
                "Nothing is overwritten: give another output=..."
            )


def git_revision() -> str | None:
    """The commit of the working directory's git repository, if there is one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
