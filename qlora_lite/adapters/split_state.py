"""Where the layers of a run start: made once, saved with the adapter, replayed ever after.

Some methods take something out of a weight before it is quantised (`Method.split`). What they took
must be the same whenever that base is loaded again, to the bit: it is kept in the layer's state and
handed back, never computed anew.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from qlora_lite.adapters.layer import START
from qlora_lite.adapters.method import Method, Requirement
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.seeds import generator
from qlora_lite.model.quantise import RoundTrip, Split
from qlora_lite.model.targets import LinearSpec


class SplitState:
    """The starts of the planned layers.

    Args:
        specs: the planned layers.
        seed: of the run; every layer draws from a stream of its own.
        saved: the adapter's whole state by `path.name`, on resume, load and merge.
    """

    def __init__(
        self,
        method: Method,
        specs: Sequence[LinearSpec],
        seed: int,
        saved: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.method = method
        self.specs = {spec.path: spec for spec in specs}
        self.seed = seed
        self._saved = by_layer(saved or {}, self.specs)
        self._made: dict[str, dict[str, Tensor]] = {}

    def split(self, path: str) -> Split | None:
        """What to quantise in place of the weight at `path`; None: the weight itself."""
        if path not in self.specs or Requirement.ORIGINAL_WEIGHTS not in self.method.requires:
            return None

        def split(dense: Tensor, round_trip: RoundTrip) -> Tensor:
            draws = generator(self.seed, "split", path)
            saved = self.replay(path) if path in self._saved else None
            left, made = self.method.split(self.specs[path], dense, round_trip, draws, saved)
            if saved is None:
                self._made[path] = {n: t.detach().cpu() for n, t in (made or {}).items()}
            return left

        return split

    def build_from(self, path: str) -> Mapping[str, Tensor] | None:
        """What `Method.build` is told: all that was saved, or what `split` found, or nothing."""
        if path in self._saved:
            return self._saved[path] | self.replay(path)
        return self._made.get(path)

    def replay(self, path: str) -> dict[str, Tensor]:
        """What `split` found for a layer, now or when it was first loaded."""
        if path not in self._saved:
            return self._made.get(path, {})
        saved = self._saved[path]
        found = {name: tensor for name, tensor in saved.items() if name.startswith(START)}
        return {name.removeprefix(START): tensor.clone() for name, tensor in found.items()}


def by_layer(state: Mapping[str, Tensor], paths: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of an adapter's state that belong to the layers at `paths`, by path and name."""
    known = set(paths)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        path = name
        while path and path not in known:
            path = path.rpartition(".")[0]
        if path:
            found.setdefault(path, {})[name.removeprefix(f"{path}.")] = tensor
    return found


def require_fit(spec: LinearSpec, down: Tensor, up: Tensor) -> None:
    """A saved pair must be one of this layer.

    Raises:
        AdapterError: if it maps other numbers of features.
    """
    got = (down.shape[1], up.shape[0])
    if got != (spec.d_in, spec.d_out):
        raise AdapterError(
            f"{spec.path}: the saved adapter maps {got[0]} to {got[1]} features, the base "
            f"{spec.d_in} to {spec.d_out}. It was trained on another base model"
        )


def require_original(method: Method, *, is_packed: bool) -> None:
    """Refuse a checkpoint that is quantised already, if the method begins before quantisation.

    Raises:
        AdapterError: if the original weights are needed and gone.
    """
    if is_packed and Requirement.ORIGINAL_WEIGHTS in method.requires:
        raise AdapterError(
            f"adapter={method.settings.kind} with these settings begins at the weights before they "
            "are quantised, and this checkpoint is quantised already. Take the unquantised model "
            "as base.model and set base.quant, or another start"
        )
