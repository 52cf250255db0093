"""Who is told what happens. Library functions print nothing; they tell a `Watcher`.

The silent one is the default. A command hands in one that draws on the terminal.
"""

from typing import Any


class Watcher:
    """Hears of every stage of a run. Each method may be overridden; none needs to be."""

    def note(self, text: str) -> None:
        """Something that the user should know once."""

    def loading(self, done_bytes: int, total_bytes: int) -> None:
        """The base is being read."""

    def planned(self, plan: Any) -> None:
        """The memory plan, before anything large is loaded."""

    def prepared(self, data: Any) -> None:
        """Data is tokenised: statistics and rows."""

    def started(self, step: int, total: int) -> None:
        """Training begins or goes on at `step` of `total`."""

    def stepped(self, metrics: dict[str, Any]) -> None:
        """An optimizer step is done and logged."""

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """The held-out rows were scored."""

    def saved(self, step: int) -> None:
        """A checkpoint is complete."""

    def ended(self) -> None:
        """Training is over, whichever way."""

    def writing(self, done_bytes: int, total_bytes: int) -> None:
        """Weights are being written."""
