"""What is trained: every method of the catalogue at one budget, and extra runs for some claims.

A method is its `kind` and assignments to the recipe of `budget.py`, so a new method of the
catalogue takes part without a line here. The budget is rank 8. `SETTINGS` has the methods that
define their rank differently, with settings of about the same size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lite.foundation.errors import RecipeError
from qlora_lite.methods.catalogue import METHODS

REFERENCE = "lora"
RANK = 8
HIGH_RANK = 64

SETTINGS: dict[str, tuple[str, ...]] = {
    # alpha = r, as in the authors' scripts
    "pissa": ("adapter.alpha=8",),
    "ba_lora": ("adapter.alpha=8",),
    # s = 1: the first part of the QR is subtracted from the weight, as in the paper
    "olora": ("adapter.alpha=8",),
    # from 12 triplets a layer to 8 on average
    "adalora": ("adapter.rank=12", "adapter.target_rank=8", "adapter.alpha=24"),
    # 12 gates per layer from N(0, 1): 40 steps shrink a third of them to zero
    "sora": ("adapter.rank=12", "adapter.alpha=24", "adapter.threshold=0.011"),
    # ranks 4 to 12 over the blocks; the default of 40 steps between events is the whole run
    "prilora": ("adapter.prune_every=10",),
    # two blocks of rank 4: an update of rank 8 with the parameters of rank 4
    "melora": ("adapter.rank=4", "adapter.num_blocks=2", "adapter.alpha=8"),
    # boosters of rank 1, a new one every 8 steps
    "xgblora": ("adapter.rank=1",),
}


@dataclass(frozen=True)
class Contender:
    """A method and its settings, under the name of its runs."""

    name: str
    kind: str
    settings: tuple[str, ...] = ()
    serves: tuple[str, ...] = ()
    """Methods whose claims need this run; empty for the methods themselves."""

    @property
    def assignments(self) -> tuple[str, ...]:
        """Overrides of the recipe."""
        return (f"adapter={self.kind}", *self.settings)


def kinds() -> list[str]:
    """Every method of the catalogue."""
    return [settings.model_fields["kind"].default for settings in METHODS]


def contenders(only: Sequence[str]) -> tuple[Contender, ...]:
    """The methods that take part: all, or LoRA and those of `only`.

    Raises:
        RecipeError: if a name is not a method.
    """
    known = kinds()
    if unknown := sorted(set(only) - set(known)):
        raise RecipeError(f"--only {unknown[0]}: no such method. There are {', '.join(known)}")
    chosen = [k for k in known if not only or k in only or k == REFERENCE]
    return tuple(Contender(kind, kind, SETTINGS.get(kind, ())) for kind in chosen)


def extras(chosen: Sequence[Contender]) -> tuple[Contender, ...]:
    """The extra runs that the claims of these methods need."""
    names = {contender.name for contender in chosen}
    return tuple(extra for extra in _all_extras() if names & set(extra.serves))


def _all_extras() -> list[Contender]:
    return [
        *(_lora_at(rank) for rank in range(1, RANK)),
        _at_high_rank("lora-high-rank", "lora", 2 * HIGH_RANK, ("dora",)),
        _at_high_rank("dora-high-rank", "dora", 2 * HIGH_RANK, ("dora",)),
        _at_high_rank("lora-high-rank-same-alpha", "lora", 2 * RANK, ("rslora",)),
        _at_high_rank("rslora-high-rank", "rslora", 2 * RANK, ("rslora",)),
    ]


def _lora_at(rank: int) -> Contender:
    """LoRA at a lower rank, with the scale of rank 8."""
    equals = {1: ("lora_mini", "xgblora"), 4: ("melora",)}
    settings = (f"adapter.rank={rank}", f"adapter.alpha={2 * rank}")
    return Contender(at_rank(rank), "lora", settings, ("dylora", *equals.get(rank, ())))


def at_rank(rank: int) -> str:
    """Name of the LoRA run with this rank."""
    return REFERENCE if rank == RANK else f"{REFERENCE}-rank-{rank}"


def _at_high_rank(name: str, kind: str, alpha: int, serves: tuple[str, ...]) -> Contender:
    settings = (f"adapter.rank={HIGH_RANK}", f"adapter.alpha={alpha}")
    return Contender(name, kind, settings, serves)
