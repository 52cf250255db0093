"""Callbacks of a run. Library functions print nothing; they call the methods of a `Watcher`.

The default one does nothing. The commands pass one that prints to the terminal.
"""

from typing import Any


class Watcher:
    """One method for each stage of a run. Override those of interest; the rest do nothing."""

    def note(self, text: str) -> None:
        """A message for the user."""

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """The base model is being loaded."""

    def planned(self, plan: Any) -> None:
        """The memory plan is made. Nothing large is loaded yet."""

    def reading(self, done_rows: int, total_rows: int | None) -> None:
        """Rows are being read and tokenised. Their total is known when all are read."""

    def prepared(self, data: Any) -> None:
        """The data is tokenised."""

    def started(self, step: int, total: int) -> None:
        """Training starts, or resumes after `step` of `total` steps."""

    def stepped(self, metrics: dict[str, Any]) -> None:
        """An optimizer step is done. `metrics` is its line in the log."""

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """The held-out rows were scored."""

    def saved(self, step: int) -> None:
        """A checkpoint is complete."""

    def ended(self) -> None:
        """Training ended, also after an error or a signal."""

    def writing(self, done_bytes: int, total_bytes: int) -> None:
        """Weights are being written."""
