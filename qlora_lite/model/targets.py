"""The linear layers of a model, and which of them `targets` selects.

| targets         | layers                                                      |
|-----------------|-------------------------------------------------------------|
| `all-linear`    | every linear layer of the decoder, not the head             |
| `attention`     | the linear layers of the attention                          |
| `mlp`           | the linear layers of the MLP                                |
| a list          | of these words, last names (`q_proj`), paths, or path globs |
"""

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qlora_lite.foundation.errors import AdapterError
from qlora_lite.model.shape import ModelShape

Kind = Literal["attention", "mlp", "head", "other"]

_ATTENTION = re.compile(r"attn|attention")
_MLP = re.compile(r"mlp|ffn|feed_forward|experts?\b|^fc\d|dense_(h_to_4h|4h_to_h)")


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer: its path, size and kind."""

    path: str
    d_in: int
    d_out: int
    block: int | None
    """Index of its decoder layer."""
    num_blocks: int
    kind: Kind

    @property
    def name(self) -> str:
        """Last part of the path, such as `q_proj`."""
        return self.path.rpartition(".")[2]


def linear_specs(shape: ModelShape) -> list[LinearSpec]:
    """Every linear layer, including the head, in the model's order."""
    specs = []
    for path, p in shape.matrices.items():
        kind: Kind = "head" if p.role == "head" else _kind(path, shape.blocks, p.block)
        specs.append(LinearSpec(path, p.d_in, p.d_out, p.block, shape.layers, kind))
    return specs


def select(specs: Sequence[LinearSpec], targets: str | Sequence[str]) -> list[LinearSpec]:
    """The layers that `targets` selects, in the model's order.

    Raises:
        AdapterError: naming the target that matches nothing, and the available names.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for target in wanted:
        matches = {spec.path for spec in specs if _matches(spec, target)}
        if not matches:
            raise AdapterError(_nothing(target, specs))
        chosen |= matches
    return [spec for spec in specs if spec.path in chosen]


def _kind(path: str, blocks: str, block: int | None) -> Kind:
    """The kind of a layer, from its path inside the decoder layer."""
    inside = "" if block is None else path.removeprefix(f"{blocks}.{block}.")
    if _ATTENTION.search(inside):
        return "attention"
    return "mlp" if _MLP.search(inside) else "other"


def _matches(spec: LinearSpec, target: str) -> bool:
    if target == "all-linear":
        return spec.kind != "head"
    if target in ("attention", "mlp"):
        return spec.kind == target
    return spec.name == target or fnmatch.fnmatchcase(spec.path, target)


def _nothing(target: str, specs: Sequence[LinearSpec]) -> str:
    names = sorted({spec.name for spec in specs})
    words = [word for word in (*names, "all-linear", "attention", "mlp") if word != target]
    near = difflib.get_close_matches(target, words, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if "," in target:
        hint = """ A list of names is written '["q_proj", "v_proj"]', with both kinds of quotes"""
    return (
        f"adapter.targets: {target!r} matches no linear layer of this model. There are "
        f"{', '.join(names)}; also all-linear, attention, mlp, paths and globs such as "
        f"{specs[0].path.replace('.0.', '.*.')!r}.{hint}"
    )
