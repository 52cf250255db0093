"""Checkpoints that were quantised by bitsandbytes and saved by transformers.

Besides `x.weight` (the codes) they contain `x.weight.absmax`, `x.weight.quant_map`, under double
quantisation `x.weight.nested_absmax` and `x.weight.nested_quant_map`, and the rest as JSON in
`x.weight.quant_state.bitsandbytes__nf4`. For int8 the row scales are `x.SCB`.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from qlora_lite.foundation.device import DeviceRule
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.foundation.files import as_stored
from qlora_lite.foundation.json_files import JsonFile, Malformed, check_as, shown
from qlora_lite.model.frozen import FrozenLinear, Scratch
from qlora_lite.model.quant import FP4, NESTED_BLOCK_SIZE, NF4, Int8, Quant
from qlora_lite.shards.checkpoint import Checkpoint

COMPANION = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$"
    r"|\.(SCB|weight_format)$"
)


METHODS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


class _Method(JsonFile):
    quant_method: str | None = None


class _Settings(JsonFile):
    """The fields of `quantization_config` that we use."""

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    llm_int8_skip_modules: list[str] | None = None


def own_quant(config: Any) -> Quant | None:
    """The quantisation of the checkpoint, or None if it is not quantised.

    Raises:
        BaseModelError: if another library quantised it, or its settings are damaged.
    """
    settings = _settings(config)
    if settings is None:
        return None
    if settings.load_in_8bit:
        return Int8()
    kind = NF4 if settings.bnb_4bit_quant_type == "nf4" else FP4
    return kind(double_quant=settings.bnb_4bit_use_double_quant)


def skipped_layers(config: Any) -> tuple[str, ...]:
    """Modules that a quantised checkpoint left unquantised: paths, or parts of them.

    Raises:
        BaseModelError: as `own_quant`.
    """
    settings = _settings(config)
    return tuple((settings and settings.llm_int8_skip_modules) or ())


def _settings(config: Any) -> _Settings | None:
    """`quantization_config` of a config; None if it has none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    if hasattr(found, "to_dict"):
        found = as_stored(found.to_dict())
    if not isinstance(found, dict):
        raise _damaged(f"it is {shown(found)}, and an object is needed")
    try:
        method = check_as(found, _Method).quant_method
        if method in METHODS:
            return check_as(found, _Settings)
    except Malformed as error:
        raise _damaged(str(error)) from None
    raise BaseModelError(
        f"the checkpoint is quantised with {method}; only weights of bitsandbytes (nf4, fp4, int8) "
        "and unquantised ones can be read. Use the model's original: it is quantised here"
    )


def _damaged(problem: str) -> BaseModelError:
    return BaseModelError(
        f"quantization_config of config.json is damaged ({problem}). Download the model again"
    )


def is_skipped(path: str, skipped: Sequence[str]) -> bool:
    """Whether the module at `path` is one of `skipped`, or inside one."""
    parts = path.split(".")
    return any(
        name.split(".") == parts[i : i + name.count(".") + 1]
        for name in skipped
        for i in range(len(parts))
    )


def stored_quant(config: Any, wanted: Quant) -> Quant | None:
    """`own_quant` of a checkpoint, checked against `base.quant`.

    Raises:
        BaseModelError: if another library quantised it, or to another kind than `wanted`.
    """
    quant = own_quant(config)
    if quant is not None and wanted.kind != quant.kind:
        raise BaseModelError(
            f"got base.quant={wanted.kind}, but the checkpoint is already quantised to "
            f"{quant.kind}. Use base.quant={quant.kind}, or the model's original"
        )
    return quant


def require_readable_dtypes(checkpoint: Checkpoint) -> None:
    """Check that weights are 16, 32 or 64 bit numbers, or codes of bitsandbytes.

    Raises:
        BaseModelError: for fp8, which needs scales that are not applied here.
    """
    for name in checkpoint.names:
        dtype = checkpoint.info(name).dtype
        if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise BaseModelError(
                f"the checkpoint is quantised: {name} is {dtype}. Only weights of bitsandbytes "
                "(nf4, fp4, int8) and unquantised ones can be read. Use the model's original: it "
                "is quantised here"
            )


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor `name` contains codes instead of weights."""
    return name.endswith(".weight") and (
        f"{name}.absmax" in checkpoint or f"{name.removesuffix('weight')}SCB" in checkpoint
    )


def read_packed(
    checkpoint: Checkpoint,
    name: str,
    rule: DeviceRule,
    bias: Tensor | None,
    scratch: Scratch,
) -> FrozenLinear:
    """Read the layer whose codes are stored as `name`."""
    codes = checkpoint.read(name).to(rule.device, copy=True)
    if bias is not None:
        bias = bias.to(rule.device, rule.norms, copy=True)
    quant: Quant
    if codes.dtype == torch.int8:
        row_scales = checkpoint.read(f"{name.removesuffix('weight')}SCB").float()
        scales = {"scales": row_scales.flatten().to(rule.device, copy=True)}
        d_out, d_in = codes.shape
        quant = Int8()
    else:
        state = _state(checkpoint, name, rule.device)
        # codes may be stored as a floating dtype
        codes = codes.view(torch.uint8).view(-1, 1)
        scales = _scales(state)
        d_out, d_in = state.shape
        settings = {"block_size": state.blocksize, "double_quant": state.nested}
        quant = NF4(**settings) if state.quant_type == "nf4" else FP4(**settings)
    return FrozenLinear(
        d_out, d_in, quant, rule.compute, codes, scales, bias, None, scratch, rule.products
    )


def _state(checkpoint: Checkpoint, name: str, device: torch.device) -> QuantState:
    parts = {
        stored.removeprefix(f"{name}."): checkpoint.read(stored)
        for stored in checkpoint.names
        if stored.startswith(f"{name}.")
    }
    return QuantState.from_dict(parts, device)


def _scales(state: QuantState) -> dict[str, Tensor]:
    if not state.nested:
        return {"scales": state.absmax.float().clone()}
    assert state.state2.blocksize == NESTED_BLOCK_SIZE, state.state2.blocksize
    return {
        "scales": state.absmax.clone(),
        "nested_scales": state.state2.absmax.float().clone(),
        "nested_map": state.state2.code.float().clone(),
        "offset": state.offset.float().clone(),
    }
