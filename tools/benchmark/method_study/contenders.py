"""What is trained: every method of the catalogue at one budget, and the runs that claims add.

A method is told apart by its kind and set by assignments over the recipe of `budget.py`, so a new
one of the catalogue takes part without a line here. Rank 8 is the budget; where a method counts its
rank otherwise, its line says how it comes to about as much.
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
    # s = 1: what is taken out of the weight is the first part of its QR, as in the paper
    "olora": ("adapter.alpha=8",),
    # from 12 triplets a layer to 8 on average
    "adalora": ("adapter.rank=12", "adapter.target_rank=8", "adapter.alpha=24"),
    # 12 gates a layer, drawn from N(0, 1): a third of them is below what 40 steps take off
    "sora": ("adapter.rank=12", "adapter.alpha=24", "adapter.threshold=0.011"),
    # ranks 4 to 12 over the blocks; the 40 steps between two events would be the whole run
    "prilora": ("adapter.prune_every=10",),
    # two minis of rank 4: an update of rank 8 from the numbers of rank 4
    "melora": ("adapter.rank=4", "adapter.num_blocks=2", "adapter.alpha=8"),
    # boosters of rank 1, a new one every 8 steps
    "xgblora": ("adapter.rank=1",),
}


@dataclass(frozen=True)
class Contender:
    """One way to train, under a name that its runs carry."""

    name: str
    kind: str
    settings: tuple[str, ...] = ()
    serves: tuple[str, ...] = ()
    """Methods whose claims need it; empty for a method that takes part itself."""

    @property
    def assignments(self) -> tuple[str, ...]:
        """What is laid over the recipe."""
        return (f"adapter={self.kind}", *self.settings)


def kinds() -> list[str]:
    """Every method of the catalogue."""
    return [settings.model_fields["kind"].default for settings in METHODS]


def contenders(only: Sequence[str]) -> tuple[Contender, ...]:
    """The methods that take part: all, or LoRA and those of `only`.

    Raises:
        RecipeError: if a name is no method.
    """
    known = kinds()
    if unknown := sorted(set(only) - set(known)):
        raise RecipeError(f"--only {unknown[0]}: no such method. There are {', '.join(known)}")
    chosen = [k for k in known if not only or k in only or k == REFERENCE]
    return tuple(Contender(kind, kind, SETTINGS.get(kind, ())) for kind in chosen)


def extras(chosen: Sequence[Contender]) -> tuple[Contender, ...]:
    """The runs that the claims of these methods need beside them."""
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
    """LoRA at a lower rank, with the scale that it has at rank 8."""
    equals = {1: ("lora_mini", "xgblora"), 4: ("melora",)}
    settings = (f"adapter.rank={rank}", f"adapter.alpha={2 * rank}")
    return Contender(at_rank(rank), "lora", settings, ("dylora", *equals.get(rank, ())))


def at_rank(rank: int) -> str:
    """The name under which LoRA of this rank runs."""
    return REFERENCE if rank == RANK else f"{REFERENCE}-rank-{rank}"


def _at_high_rank(name: str, kind: str, alpha: int, serves: tuple[str, ...]) -> Contender:
    settings = (f"adapter.rank={HIGH_RANK}", f"adapter.alpha={alpha}")
    return Contender(name, kind, settings, serves)
