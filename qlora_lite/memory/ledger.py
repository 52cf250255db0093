"""The memory of a training run as a sum of named terms, each with its formula.

    ledger = make_ledger(model, run, rows=4)
    ledger.peak_bytes

Everything is computed from shapes, before anything is downloaded. The peak is what always exists,
plus the largest of three temporary parts that never coexist: the loss, the backward of one layer,
and the optimizer step.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from qlora_lite.adapters.method import Footprint
from qlora_lite.foundation.units import format_bytes
from qlora_lite.kernels.cross_entropy import CHUNK_TOKENS
from qlora_lite.memory import formulas
from qlora_lite.memory.allocator import FREED_BYTES
from qlora_lite.memory.formulas import FP32, Attention, QuantKind, States
from qlora_lite.memory.terms import Ledger, Term
from qlora_lite.memory.zero_terms import ZeroShape, added_terms, divide, trained_terms
from qlora_lite.model.frozen import piece_rows
from qlora_lite.model.shape import ModelShape, ParameterShape

PROCESS_BYTES = 560 * 2**20
"""Python with torch, transformers, bitsandbytes and datasets loaded: 473 MiB resident, measured
with the pinned versions on Linux x86-64 (CPU build of torch); plus what the math libraries allocate
in the first steps, 60 to 140 MiB more than the terms of this ledger on a 100 M model. The sum is
fitted to these few runs, not measured."""

CPU_MARGIN_BYTES, CPU_MARGIN_SHARE, MOST_CPU_MARGIN_BYTES = 64 * 2**20, 0.3, 256 * 2**20
"""Margin on CPU: min(256 MiB, 64 MiB + 30 % of the tensors). Measured peaks of
SmolLM2-135M (NF4, fp32 and bf16) were 89 to 211 MiB above the tensors and the process, those of the
embedded base up to 61 MiB. A plan that says too little is worse than one that says too much."""

CUDA_CONTEXT_BYTES = 600 * 10**6
"""Context and kernels of a CUDA process, outside PyTorch's allocator: 0.45 to 0.8 GB, by card."""

CUDA_FRAGMENTATION = 0.04
"""Share that PyTorch's allocator reserves but does not use: 2 to 5 % with expandable segments."""

_UNPACKED = {"fp32": 4, "bf16": 2}
"""Bytes per weight that is not quantised."""

FULL_MODULE_BYTES = FP32
"""Bytes of a parameter of a fully trained module."""


@dataclass(frozen=True)
class RunShape:
    """What the memory of a run depends on, as plain values."""

    device: Literal["cpu", "cuda"]
    quant: QuantKind
    adapters: Mapping[str, Footprint]
    """Sizes of the adapter of every adapted linear layer, by path."""
    rank: int
    """The setting that they depend on."""
    max_tokens: int
    """Tokens of the longest row and of a full bin."""
    tokens_per_step: int
    logit_copies: int = 3
    """Chunk-sized fp32 tensors of logits that the loss needs at the same time."""
    has_teacher: bool = False
    """Whether the base without adapter also runs forward on every batch."""
    double_quant: bool = True
    block_size: int = 64
    head: Literal["16bit", "int8", "nf4"] = "16bit"
    compute_bytes: int = 2
    """Bytes per element of dequantised weights, and of activations unless norms widen them."""
    storage_bytes: int = 2
    """Bytes per element of the stored embedding and of a 16-bit head."""
    norm_bytes: int = 2
    adapter_bytes: int = 2
    states: States = "32bit"
    rounding: Literal["master", "stochastic"] = "master"
    embedding_rank: int = 0
    full_parameters: int = 0
    """Parameters of fully trained modules, norms included, in fp32."""
    checkpointing: bool = True
    attention: Attention = "sdpa"
    micro_batch_tokens: int | None = None
    """Tokens per forward; chosen by the plan unless given."""
    unquantised: frozenset[str] = frozenset()
    """Paths of linear layers that a quantised checkpoint stores unquantised."""
    unquantised_bytes: int = 2
    """Bytes per element of these."""
    processes: int = 1
    zero: ZeroShape | None = None
    """None: every process has the whole model."""


def make_ledger(model: ModelShape, run: RunShape, rows: int) -> Ledger:
    """The sum of one process, for micro-batches of `rows` rows of `run.max_tokens` tokens."""
    terms = [*_weights(model, run), *_trained(model, run)]
    if run.zero is not None:
        base = sum(t.num_bytes - t.whole_bytes for t in terms if t.part == "parameters")
        largest, codes = max(_gathered_bytes(model, run)), _UNPACKED.get(run.quant, 1)
        terms = [
            *divide(terms, run.zero, run.processes, run.device),
            *added_terms(run.zero, run.processes, run.device, largest, codes, base),
        ]
    terms += _activations(model, run, rows)
    terms += _overhead(run, sum(term.num_bytes for term in terms if term.place == "device"))
    if run.device == "cpu":
        terms.append(_freed(model, rows * run.max_tokens))
    if run.device == "cuda":
        terms.append(Term("process", PROCESS_BYTES, "Python and its libraries", "host"))
    return Ledger(tuple(term for term in terms if term.num_bytes))


def num_trained(model: ModelShape, run: RunShape) -> int:
    """Number of parameters that the optimizer updates."""
    return _num_adapter(model, run) + run.full_parameters


# -- the parts -------------------------------------------------------------------------------------


def _weights(model: ModelShape, run: RunShape) -> Iterator[Term]:
    linears = [p for path, p in model.linears.items() if path not in run.unquantised]
    num_weights = sum(p.num_weights for p in linears)
    packed = sum(_packed(p, run) for p in linears)
    skipped = sum(model.linears[path].num_weights for path in run.unquantised)
    yield _frozen(
        "linear layers that stay unquantised",
        skipped * run.unquantised_bytes,
        f"{skipped:,} x {run.unquantised_bytes} B",
    )
    yield _frozen(
        f"linear layers in {run.quant}",
        packed,
        f"{num_weights:,} weights x {8 * packed / max(num_weights, 1):.4g} bits",
        scales=packed - sum(formulas.code_bytes(p.num_weights, run.quant) for p in linears),
    )
    embedding = sum(p.num_weights for p in model.stored if p.role == "embedding")
    formula = f"{embedding:,} x {run.storage_bytes} B"
    yield _frozen("embedding", embedding * run.storage_bytes, formula)
    head = model.head
    if model.is_tied:
        pass  # the head is the embedding, and stays in 16 bit
    elif run.head != "16bit":
        num_bytes = formulas.packed_bytes(head.d_out, head.d_in, run.head)
        scales = num_bytes - formulas.code_bytes(head.num_weights, run.head)
        formula = f"{head.num_weights:,} weights and scales"
        yield _frozen(f"head in {run.head}", num_bytes, formula, scales)
    else:
        formula = f"{head.num_weights:,} x {run.storage_bytes} B"
        yield _frozen("head", head.num_weights * run.storage_bytes, formula)
    small = sum(p.num_weights for p in model.stored if p.role in ("norm", "bias"))
    yield _frozen("norms and biases", small * run.norm_bytes, f"{small:,} x {run.norm_bytes} B")
    for name, role in (("experts", "experts"), ("other weights", "other")):
        num = sum(p.num_weights for p in model.stored if p.role == role)
        num_bytes, formula = num * run.compute_bytes, f"{num:,} x {run.compute_bytes} B"
        yield _frozen(f"{name}, not quantised", num_bytes, formula)
    scratch = max(_scratch_weights(model, run), default=0)
    yield Term(
        "one dequantised weight",
        scratch * run.compute_bytes,
        f"{scratch:,} x {run.compute_bytes} B, a buffer that all layers share",
    )


def _frozen(name: str, num_bytes: int, formula: str, scales: int = 0) -> Term:
    """A term of frozen parameters, with the bytes of their scales among them."""
    return Term(name, num_bytes, formula, part="parameters", whole_bytes=scales)


def _gathered_bytes(model: ModelShape, run: RunShape) -> Iterator[int]:
    """Frozen weights that ZeRO-3 gathers together: an embedding, the head, or a decoder layer."""
    by_layer: dict[int | None, int] = defaultdict(int)
    for p in model.stored:
        if p.role == "embedding":
            yield p.num_weights * run.storage_bytes
        elif p.module in run.unquantised:
            by_layer[p.block] += p.num_weights * run.unquantised_bytes
        elif p.role == "linear":
            by_layer[p.block] += formulas.code_bytes(p.num_weights, run.quant)
        elif p.role == "experts":
            by_layer[p.block] += p.num_weights * run.compute_bytes
    if run.head == "16bit" or model.is_tied:
        yield model.head.num_weights * run.storage_bytes
    else:
        yield formulas.code_bytes(model.head.num_weights, run.head)
    yield from by_layer.values()


def _packed(weight: ParameterShape, run: RunShape) -> int:
    return formulas.packed_bytes(
        weight.d_out, weight.d_in, run.quant, run.block_size, run.double_quant
    )


def _scratch_weights(model: ModelShape, run: RunShape) -> Iterator[int]:
    """Sizes of the dequantisation buffer: for every weight not stored in the compute dtype."""
    if _UNPACKED.get(run.quant) != run.compute_bytes:
        for p in model.linears.values():
            yield piece_rows(p.d_out, p.d_in) * p.d_in
    if (run.head != "16bit" and not model.is_tied) or run.storage_bytes != run.compute_bytes:
        yield piece_rows(model.head.d_out, model.head.d_in) * model.head.d_in


def _trained(model: ModelShape, run: RunShape) -> Iterator[Term]:
    adapter, full = _num_adapter(model, run), run.full_parameters
    kinds = [
        ("adapters", adapter, run.adapter_bytes),
        ("fully trained modules", full, FULL_MODULE_BYTES),
    ]
    for name, num, element_bytes in kinds:
        formula = f"{num:,} x {element_bytes} B"
        yield Term(name, num * element_bytes, formula)
        formula = f"{num:,} x 4 B, summed in fp32"
        yield Term(f"{name}: gradients", num * FP32, formula, part="gradients")
    frozen = sum(f.frozen for f in run.adapters.values())
    yield Term(
        "adapters: frozen factors",
        frozen * run.adapter_bytes,
        f"{frozen:,} x {run.adapter_bytes} B",
    )
    statistics = sum(f.statistics for f in run.adapters.values())
    yield Term("adapters: statistics", statistics * FP32, f"{statistics:,} x 4 B")
    if run.zero is not None:
        yield from trained_terms(adapter + full, run.zero, run.device)
        return
    if run.rounding == "master" and run.adapter_bytes != FP32:
        formula = f"{adapter:,} x 4 B"
        yield Term("adapters: fp32 master copies", adapter * FP32, formula, part="states")
    states = formulas.optimizer_bytes(adapter + full, run.states)
    formula = f"{adapter + full:,} x 2 moments in {run.states}"
    yield Term("Adam's moments", states, formula, part="states")


def _num_adapter(model: ModelShape, run: RunShape) -> int:
    embedding = formulas.lora_parameters(model.vocab, model.hidden, run.embedding_rank)
    return sum(f.trained for f in run.adapters.values()) + embedding


def _activations(model: ModelShape, run: RunShape, rows: int) -> Iterator[Term]:
    """Activations saved from forward to backward, and the largest temporary part."""
    b, tokens, hidden = _activation_bytes(model, run), rows * run.max_tokens, model.hidden
    by_layer = [_saved_bytes(model, run, block, tokens) for block in range(model.layers)]
    if run.checkpointing:
        saved = model.layers * tokens * hidden * b
        name = "inputs of the checkpointed layers"
    else:
        saved = sum(by_layer)
        name = "activations saved for backward"
    each = f"{saved / model.layers / tokens:,.0f} B"
    yield Term(name, saved, f"{model.layers} layers x {tokens:,} tokens x {each}")
    yield Term(
        "batch and mask",
        rows * (run.max_tokens * 3 * 8 + run.max_tokens**2),
        f"{tokens:,} ids, targets, positions; {rows} x {run.max_tokens:,}^2 of mask",
    )
    loss = formulas.loss_bytes(tokens, CHUNK_TOKENS, model.vocab, hidden, b, run.logit_copies)
    layer = tokens * formulas.backward_bytes_per_token(hidden, model.ff, b)
    layer += max(by_layer) if run.checkpointing else 0
    yield Term(
        "temporary: the loss" if loss > layer else "temporary: backward of one layer",
        max(loss, layer),
        f"the larger of the loss, {format_bytes(loss)}, and one layer, {format_bytes(layer)}",
    )
    update = _update_bytes(model, run)
    yield Term(
        "temporary: optimizer step",
        max(update - saved - max(loss, layer), 0),
        f"{format_bytes(update)} when the activations are freed",
    )


def _update_bytes(model: ModelShape, run: RunShape) -> int:
    """What exists only during the optimizer step."""
    num = num_trained(model, run)
    if run.zero is not None:
        return formulas.flat_update_bytes(-(-num // run.processes))
    update = formulas.update_bytes(_num_adapter(model, run), run.adapter_bytes, run.rounding)
    return update + (2 * FP32 * num if run.processes > 1 else 0)  # sums over the processes


def _activation_bytes(model: ModelShape, run: RunShape) -> int:
    """Bytes per element: an RMSNorm with fp32 weights makes what follows fp32, a LayerNorm not."""
    return run.compute_bytes if model.layer_norm else max(run.compute_bytes, run.norm_bytes)


def _saved_bytes(model: ModelShape, run: RunShape, block: int, tokens: int) -> int:
    """Bytes that one layer saves for backward, with its adapters in the compute dtype if cast."""
    adapters = [f for path, f in run.adapters.items() if model.matrices[path].block == block]
    per_token = formulas.saved_bytes_per_token(
        model.hidden,
        model.heads,
        model.kv_heads,
        model.head_dim,
        model.ff,
        sum(f.width for f in adapters),
        _activation_bytes(model, run),
        run.attention,
        run.max_tokens,
        gated=model.gated,
        qk_norm=model.qk_norm,
        layer_norm=model.layer_norm,
    )
    if run.adapter_bytes == run.compute_bytes:
        return tokens * per_token
    return tokens * per_token + sum(f.trained + f.frozen for f in adapters) * run.compute_bytes


def _freed(model: ModelShape, tokens: int) -> Term:
    """Freed memory that malloc keeps until layers have left enough of it, or one has."""
    layer = tokens * formulas.backward_bytes_per_token(model.hidden, model.ff, FP32)
    return Term(
        "freed memory that malloc keeps",
        min(max(layer, FREED_BYTES), model.layers * layer),
        f"{format_bytes(FREED_BYTES)} or what one layer leaves, {format_bytes(layer)}",
    )


def _overhead(run: RunShape, used: int) -> Iterator[Term]:
    """What tensors do not explain; `used` is the sum of all other terms."""
    if run.device == "cpu":
        yield Term("process", PROCESS_BYTES, "Python and its libraries, fitted to runs on CPU")
        margin = CPU_MARGIN_BYTES + round(CPU_MARGIN_SHARE * used)
        yield Term(
            "margin",
            min(margin, MOST_CPU_MARGIN_BYTES),
            f"{format_bytes(CPU_MARGIN_BYTES)} + {CPU_MARGIN_SHARE:.0%} of the tensors, at most "
            f"{format_bytes(MOST_CPU_MARGIN_BYTES)}",
        )
        return
    fragments = round(CUDA_FRAGMENTATION * used)
    yield Term(
        "CUDA context and fragmentation",
        CUDA_CONTEXT_BYTES + fragments,
        f"{format_bytes(CUDA_CONTEXT_BYTES)} + {CUDA_FRAGMENTATION:.0%} of the above",
        is_measured=False,
    )
