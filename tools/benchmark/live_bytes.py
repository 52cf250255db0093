"""Peak bytes of live tensors, counted operator by operator."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators allocate until they are freed, except `resident` ones."""

    def __init__(self, resident: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in resident}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return outputs

    def _gone(self, key: int, num_bytes: int) -> None:
        self.known.discard(key)
        self.now -= num_bytes
