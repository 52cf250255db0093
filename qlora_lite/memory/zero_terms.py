"""What DeepSpeed ZeRO divides among processes, and where it keeps the shares.

| part         | what                            | zero1 | zero2 | zero3 | kept in              |
|--------------|---------------------------------|-------|-------|-------|----------------------|
| `states`     | fp32 masters, optimizer states  | 1/N   | 1/N   | 1/N   | `offload.optimizer`  |
| `gradients`  | of the trained parameters       | whole | 1/N   | 1/N   | with the states      |
| `parameters` | frozen codes and 16-bit weights | whole | whole | 1/N   | `offload.parameters` |

Everything else is whole in every process: trained parameters, buffers such as scales, activations.
A weight of the base is gathered while it is used. Loading needs less than that: a process has one
whole tensor beyond its share, and no activations.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from qlora_lite.foundation.units import format_bytes
from qlora_lite.memory import formulas
from qlora_lite.memory.formulas import FP32
from qlora_lite.memory.terms import Kept, Part, Term
from qlora_lite.offload.settings import Place

DIVIDED: dict[int, frozenset[Part]] = {
    1: frozenset({"states"}),
    2: frozenset({"states", "gradients"}),
    3: frozenset({"states", "gradients", "parameters"}),
}
"""By stage."""


@dataclass(frozen=True)
class ZeroShape:
    """What memory depends on in a DeepSpeed configuration."""

    stage: Literal[1, 2, 3]
    optimizer: Place = "none"
    parameters: Place = "none"
    bucket_numbers: int = 0
    """Numbers of a communication bucket."""
    num_buckets: int = 1
    live_numbers: int = 0
    """Numbers of gathered weights that are kept or fetched ahead, beyond the module that runs."""
    swap_bytes: int = 0
    """Host memory of the buffers between a disk and the device."""


def trained_terms(num: int, zero: ZeroShape, device: str) -> Iterator[Term]:
    """What DeepSpeed has of `num` trained parameters, besides their values and gradients."""
    yield Term("fp32 master copies", num * FP32, f"{num:,} x 4 B", part="states")
    states = formulas.flat_optimizer_bytes(num)
    yield Term("optimizer states", states, f"{num:,} x 4 states x 4 B", part="states")
    is_moved = zero.optimizer != "none" or (zero.parameters != "none" and device == "cuda")
    if zero.stage == 3 and is_moved:  # otherwise the master is its share
        yield Term("shares of trained parameters", num * FP32, f"{num:,} x 4 B", part="parameters")
    elif is_moved:
        yield Term("copies to be moved", 2 * num * FP32, f"{num:,} x 2 x 4 B", part="states")


def divide(terms: Iterable[Term], zero: ZeroShape, processes: int, device: str) -> Iterator[Term]:
    """The terms of one process, each where it is kept."""
    for term in terms:
        place = "device" if term.part is None else _place(zero, term.part, device)
        if term.part not in DIVIDED[zero.stage] or (processes == 1 and place == "device"):
            yield term
            continue
        divided = term.num_bytes - term.whole_bytes
        yield replace(
            term,
            num_bytes=-(-divided // processes),
            formula=f"1/{processes} of {format_bytes(divided)}: {term.formula}",
            place=place,
            whole_bytes=0,
        )
        if term.whole_bytes:
            formula = "whole in every process"
            yield Term(f"{term.name}: scales", term.whole_bytes, formula)


def added_terms(
    zero: ZeroShape,
    processes: int,
    device: str,
    largest_bytes: int,
    code_bytes: int,
    base_bytes: int,
) -> Iterator[Term]:
    """What exists only with ZeRO: gathered weights and buffers.

    Args:
        largest_bytes: of the weights that are gathered together.
        code_bytes: of a number of the packed weights.
        base_bytes: of all frozen parameters.
    """
    buckets = zero.num_buckets * zero.bucket_numbers
    yield Term("communication buckets", FP32 * buckets, f"{buckets:,} x 4 B")
    place: Kept = "host" if device == "cuda" else "device"
    yield Term("buffers of the disk", zero.swap_bytes, "between disk and memory", place)
    # a single process uses its share, which is everything, where it is
    is_whole = processes == 1 and _place(zero, "parameters", device) == "device"
    if zero.stage == 3 and not is_whole:
        ahead = zero.live_numbers * code_bytes
        yield Term(
            "gathered weights",
            min(largest_bytes + ahead, base_bytes),
            f"the largest, {format_bytes(largest_bytes)}, and {format_bytes(ahead)} kept",
        )


def _place(zero: ZeroShape, part: Part, device: str) -> Kept:
    """Where a share is. On CPU, host memory is that of the device."""
    chosen = zero.parameters if part == "parameters" else zero.optimizer
    if chosen == "nvme" and part != "gradients":
        return "disk"
    return "host" if chosen != "none" and device == "cuda" else "device"
