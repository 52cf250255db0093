"""The lines of a memory plan and their sum."""

from dataclasses import dataclass
from typing import Literal

Part = Literal["parameters", "gradients", "states"]
Kept = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Term:
    """One line of the sum."""

    name: str
    num_bytes: int
    formula: str
    place: Kept = "device"
    """`device`: where the run computes. `host`: main memory, for a run on a card."""
    is_measured: bool = True
    """Whether `measure.peak_bytes` includes it: PyTorch does not count the CUDA context."""
    part: Part | None = None
    """What it is for ZeRO (`zero_terms.py`); None: every process has all of it."""
    whole_bytes: int = 0
    """Bytes of it that every process has in any case: the scales of packed weights."""


@dataclass(frozen=True)
class Ledger:
    """All terms of one process that exist at the peak."""

    terms: tuple[Term, ...]

    @property
    def peak_bytes(self) -> int:
        """Memory that the device needs."""
        return self._sum("device")

    @property
    def measured_bytes(self) -> int:
        """What `measure.peak_bytes` should return."""
        return sum(t.num_bytes for t in self.terms if t.place == "device" and t.is_measured)

    @property
    def host_bytes(self) -> int:
        """Main memory that a run on a card needs; 0 for a run on CPU."""
        return self._sum("host")

    @property
    def disk_bytes(self) -> int:
        """What ZeRO keeps on a disk."""
        return self._sum("disk")

    def _sum(self, place: str) -> int:
        return sum(t.num_bytes for t in self.terms if t.place == place)
