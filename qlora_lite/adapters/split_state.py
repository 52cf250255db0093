"""What `Method.split` took out of the weights before they were quantised.

Some methods (LoftQ, and PiSSA and OLoRA in requantise mode) change a weight before it is quantised
and start from what they took out. That must be the same whenever the base is loaded again, to the
last bit. So it is computed once, saved with the adapter, and reused on resume, load and merge.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor

from qlora_lite.adapters.layer import START
from qlora_lite.adapters.method import Method, Requirement
from qlora_lite.adapters.plan import AdapterPlan
from qlora_lite.foundation.errors import AdapterError
from qlora_lite.foundation.seeds import generator
from qlora_lite.model.quantise import RoundTrip, Split
from qlora_lite.model.targets import LinearSpec


class SplitState:
    """The split results of all adapted layers, computed now or saved earlier.

    Args:
        plan: the adapted layers.
        seed: of the run; every layer draws from its own stream.
        saved: all tensors of the adapter by `path.name`, on resume, load and merge.
    """

    def __init__(
        self,
        method: Method,
        plan: AdapterPlan,
        seed: int,
        saved: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.method = method
        self.layers = plan.layers
        self.specs = {spec.path: spec for spec in plan.specs}
        self.seed = seed
        self._saved = by_layer(saved or {}, self.specs)
        self._found: dict[str, dict[str, Tensor]] = {}

    def split(self, path: str) -> Split | None:
        """The function that changes the weight at `path` before it is quantised, or None."""
        if path not in self.specs or Requirement.ORIGINAL_WEIGHTS not in self.method.requires:
            return None

        def split(dense: Tensor, round_trip: RoundTrip) -> Tensor:
            draws = generator(self.seed, "split", path)
            saved = self.start_of(path) if path in self._saved else None
            remainder, start = self.method.split(
                self.specs[path], self.layers[path], dense, round_trip, draws, saved
            )
            if saved is None:
                self._found[path] = {n: t.detach().cpu() for n, t in (start or {}).items()}
            return remainder

        return split

    def build_state(self, path: str) -> Mapping[str, Tensor] | None:
        """The `start` argument of `Method.build`: the saved state, else the split result."""
        if path in self._saved:
            return self._saved[path] | self.start_of(path)
        return self._found.get(path)

    def start_of(self, path: str) -> dict[str, Tensor]:
        """The result of `Method.split` for a layer, computed now or saved earlier."""
        if path not in self._saved:
            return self._found.get(path, {})
        saved = self._saved[path]
        start = {name: tensor for name, tensor in saved.items() if name.startswith(START)}
        return {name.removeprefix(START): tensor.clone() for name, tensor in start.items()}


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
    """Check that a saved pair has the shape of this layer.

    Raises:
        AdapterError: if the shapes differ.
    """
    got = (down.shape[1], up.shape[0])
    if got != (spec.d_in, spec.d_out):
        raise AdapterError(
            f"{spec.path}: the saved adapter maps {got[0]} to {got[1]} features, the base "
            f"{spec.d_in} to {spec.d_out}. It was trained on another base model"
        )


def require_original(method: Method, *, is_packed: bool) -> None:
    """Refuse an already quantised checkpoint if the method needs the original weights.

    Raises:
        AdapterError: if the original weights are needed and not available.
    """
    if is_packed and Requirement.ORIGINAL_WEIGHTS in method.requires:
        raise AdapterError(
            f"adapter={method.settings.kind} with these settings needs the weights before "
            "quantisation, and this checkpoint is already quantised. Use the unquantised model as "
            "base.model and set base.quant, or use another adapter.start"
        )
