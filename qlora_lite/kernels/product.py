"""x W^T by one of two libraries.

On a CPU, torch computes fp32 products with MKL: 105 GFLOP/s on a core of an AMD Zen 5, where oneDNN
reaches 243. On processors without AVX-512, MKL is as fast or faster. So which one is used is
measured when a run starts (`speed.py`). oneDNN is strict here too: only the order of sums differs.

torch has no public function for a product by oneDNN. `mkldnn._linear_pointwise` has no gradient and
no `out`, so it is only used inside autograd functions of our own (`model/frozen.py`).
"""

import torch
from torch import Tensor

from qlora_lite.foundation.device import ProductLibrary


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN."""
    return torch.backends.mkldnn.is_available()


def reference(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x W^T by torch: (n, d_in) and (d_out, d_in) -> (n, d_out)."""
    return torch.mm(x, weight.T, out=out)


def product(
    x: Tensor, weight: Tensor, library: ProductLibrary = "torch", out: Tensor | None = None
) -> Tensor:
    """`reference` by the given library, without gradient. oneDNN computes in fp32 on CPU only.

    Args:
        weight: may be the transposed view of a dense matrix.
    """
    if library == "torch" or x.dtype != torch.float32 or not _is_dense(weight):
        return reference(x, weight, out)
    y = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y if out is None else out.copy_(y)


def _is_dense(weight: Tensor) -> bool:
    # a transposed slice would fall to oneDNN's reference kernel: minutes instead of milliseconds
    return weight.is_contiguous() or weight.T.is_contiguous()
