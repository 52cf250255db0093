"""The memory of a training run as a sum of named terms, each with its formula.

    ledger = make_ledger(model, run, rows=4)
    ledger.peak_bytes

Everything follows from shapes, so it is known before anything is downloaded. The peak is what
always exists, plus the largest of three moments that do not meet: the loss, the backward of one
layer, and the optimizer's move.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from qlora_lite.adapters.method import Footprint
from qlora_lite.foundation.units import format_bytes
from qlora_lite.kernels.cross_entropy import CHUNK_TOKENS
from qlora_lite.memory import formulas
from qlora_lite.memory.formulas import FP32, Attention, QuantKind, States
from qlora_lite.model.frozen import piece_rows
from qlora_lite.model.shape import ModelShape, ParameterShape

PROCESS_BYTES = 560 * 2**20
"""Python with torch, transformers, bitsandbytes and datasets loaded: 473 MiB resident, measured
with the pinned versions on Linux x86-64 (CPU build of torch); and what the mathematical libraries
hold after the first steps, 60 to 140 MiB beyond the terms of this ledger on a 100 M model. The sum
is fitted to these few runs: a calibration, not a measurement."""

CUDA_CONTEXT_BYTES = 600 * 10**6
"""Context and kernels of a CUDA process, outside PyTorch's allocator: 0.45 to 0.8 GB, by card."""

CUDA_FRAGMENTATION = 0.04
"""Share that PyTorch's allocator holds without using it: 2 to 5 % with expandable segments."""

FULL_MODULE_BYTES = FP32
"""Of a parameter of a fully trained module: fp32."""


@dataclass(frozen=True)
class RunShape:
    """What a run's settings mean for memory, as plain values."""

    device: Literal["cpu", "cuda"]
    quant: QuantKind
    adapters: Mapping[str, Footprint]
    """What the adapter of every adapted linear layer holds, by path."""
    rank: int
    """The setting that they follow from."""
    max_tokens: int
    """Tokens of a row: the longest, and a full bin."""
    tokens_per_step: int
    logit_copies: int = 3
    """Chunks of fp32 logits that the loss holds at a time."""
    has_teacher: bool = False
    """The bare base reads every batch as well."""
    double_quant: bool = True
    block_size: int = 64
    head: Literal["16bit", "int8", "nf4"] = "16bit"
    compute_bytes: int = 2
    """Of an activation, and of a dequantised weight."""
    storage_bytes: int = 2
    """Of a number of the embedding, and of a 16-bit head, at rest."""
    norm_bytes: int = 2
    adapter_bytes: int = 2
    states: States = "32bit"
    rounding: Literal["master", "stochastic"] = "master"
    embedding_rank: int = 0
    full_parameters: int = 0
    """Of fully trained modules, norms included, in fp32."""
    checkpointing: bool = True
    attention: Attention = "sdpa"
    micro_batch_tokens: int | None = None
    """What one forward sees; chosen by the plan unless given."""


@dataclass(frozen=True)
class Term:
    """One line of the sum."""

    name: str
    num_bytes: int
    formula: str
    place: Literal["device", "host"] = "device"
    """`device` is where the run computes (on CPU main memory), `host` the memory beside a card."""
    is_measured: bool = True
    """Whether `measure.peak_bytes` sees it: PyTorch does not count what CUDA takes for itself."""


@dataclass(frozen=True)
class Ledger:
    """All terms; what exists at the same time is a term of its own."""

    terms: tuple[Term, ...]

    @property
    def peak_bytes(self) -> int:
        """What the device must have."""
        return sum(t.num_bytes for t in self.terms if t.place == "device")

    @property
    def measured_bytes(self) -> int:
        """What `measure.peak_bytes` should show."""
        return sum(t.num_bytes for t in self.terms if t.place == "device" and t.is_measured)

    @property
    def host_bytes(self) -> int:
        """What main memory must have beside a card; 0 where the run computes on CPU."""
        return sum(t.num_bytes for t in self.terms if t.place == "host")


def make_ledger(model: ModelShape, run: RunShape, rows: int) -> Ledger:
    """The sum for micro-batches of `rows` rows of `run.max_tokens` tokens."""
    terms = [*_weights(model, run), *_trained(model, run), *_activations(model, run, rows)]
    terms.append(_overhead(run, sum(term.num_bytes for term in terms)))
    if run.device == "cuda":
        terms.append(Term("process", PROCESS_BYTES, "Python and its libraries", "host"))
    return Ledger(tuple(term for term in terms if term.num_bytes))


def num_trained(model: ModelShape, run: RunShape) -> int:
    """Parameters that the optimizer moves."""
    return _num_adapter(model, run) + run.full_parameters


# -- the parts -------------------------------------------------------------------------------------


def _weights(model: ModelShape, run: RunShape) -> Iterator[Term]:
    linears = model.linears.values()
    num_weights = sum(p.num_weights for p in linears)
    packed = sum(_packed(p, run) for p in linears)
    yield Term(
        f"linear layers in {run.quant}",
        packed,
        f"{num_weights:,} weights x {8 * packed / num_weights:.4g} bits",
    )
    embedding = sum(p.num_weights for p in model.stored if p.role == "embedding")
    yield Term("embedding", embedding * run.storage_bytes, f"{embedding:,} x {run.storage_bytes} B")
    head = model.head
    if model.is_tied:
        pass  # the head is the embedding, in 16 bit whatever was asked
    elif run.head != "16bit":
        num_bytes = formulas.packed_bytes(head.d_out, head.d_in, run.head, 64, True)
        yield Term(f"head in {run.head}", num_bytes, f"{head.num_weights:,} weights and scales")
    else:
        num_bytes = head.num_weights * run.storage_bytes
        yield Term("head", num_bytes, f"{head.num_weights:,} x {run.storage_bytes} B")
    small = sum(p.num_weights for p in model.stored if p.role in ("norm", "bias"))
    yield Term("norms and biases", small * run.norm_bytes, f"{small:,} x {run.norm_bytes} B")
    other = sum(p.num_weights for p in model.stored if p.role == "other")
    yield Term(
        "other weights, not quantised",
        other * run.storage_bytes,
        f"{other:,} x {run.storage_bytes} B",
    )
    scratch = max(_scratch_weights(model, run), default=0)
    yield Term(
        "one dequantised weight",
        scratch * run.compute_bytes,
        f"{scratch:,} x {run.compute_bytes} B, reused by all layers",
    )


def _packed(weight: ParameterShape, run: RunShape) -> int:
    return formulas.packed_bytes(
        weight.d_out, weight.d_in, run.quant, run.block_size, run.double_quant
    )


def _scratch_weights(model: ModelShape, run: RunShape) -> Iterator[int]:
    """Weights that are dequantised at a time, for each that does not rest in the compute dtype."""
    at_rest = {"fp32": 4, "bf16": 2}.get(run.quant)
    if at_rest != run.compute_bytes:
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
        yield Term(f"{name}: gradients", num * FP32, f"{num:,} x 4 B, summed in fp32")
    frozen = sum(f.frozen for f in run.adapters.values())
    yield Term(
        "adapters: frozen factors",
        frozen * run.adapter_bytes,
        f"{frozen:,} x {run.adapter_bytes} B",
    )
    counted = sum(f.statistics for f in run.adapters.values())
    yield Term("adapters: statistics", counted * FP32, f"{counted:,} x 4 B")
    if run.rounding == "master" and run.adapter_bytes != FP32:
        yield Term("adapters: fp32 masters", adapter * FP32, f"{adapter:,} x 4 B")
    states = formulas.optimizer_bytes(adapter + full, run.states)
    yield Term("Adam's moments", states, f"{adapter + full:,} x 2 moments in {run.states}")


def _num_adapter(model: ModelShape, run: RunShape) -> int:
    embedding = formulas.lora_parameters(model.vocab, model.hidden, run.embedding_rank)
    return sum(f.trained for f in run.adapters.values()) + embedding


def _activations(model: ModelShape, run: RunShape, rows: int) -> Iterator[Term]:
    """What is held from forward to backward, and the largest of what comes and goes."""
    b, tokens, hidden = run.compute_bytes, rows * run.max_tokens, model.hidden
    kept = [_kept_bytes(model, run, block, tokens) for block in range(model.layers)]
    if run.checkpointing:
        held = model.layers * tokens * hidden * b
        name = "inputs of the checkpointed layers"
    else:
        held = sum(kept)
        name = "activations kept for the backward"
    each = f"{held / model.layers / tokens:,.0f} B"
    yield Term(name, held, f"{model.layers} layers x {tokens:,} tokens x {each}")
    yield Term(
        "batch and mask",
        rows * (run.max_tokens * 3 * 8 + run.max_tokens**2),
        f"{tokens:,} ids, targets, positions; {rows} x {run.max_tokens:,}^2 of mask",
    )
    loss = formulas.loss_bytes(tokens, CHUNK_TOKENS, model.vocab, hidden, b, run.logit_copies)
    layer = tokens * formulas.backward_bytes_per_token(hidden, model.ff, b)
    layer += max(kept) if run.checkpointing else 0
    yield Term(
        "work of the loss" if loss > layer else "work of one layer",
        max(loss, layer),
        f"the larger of the loss, {format_bytes(loss)}, and one layer, {format_bytes(layer)}",
    )
    move = formulas.update_bytes(_num_adapter(model, run), run.adapter_bytes, run.rounding)
    yield Term(
        "move of the parameters",
        max(move - held - max(loss, layer), 0),
        f"{format_bytes(move)} when the activations are gone",
    )


def _kept_bytes(model: ModelShape, run: RunShape, block: int, tokens: int) -> int:
    """What one layer keeps of a micro-batch, and its adapters in the compute dtype if cast."""
    held = [f for path, f in run.adapters.items() if model.matrices[path].block == block]
    per_token = formulas.kept_bytes_per_token(
        model.hidden,
        model.heads,
        model.kv_heads,
        model.head_dim,
        model.ff,
        sum(f.width for f in held),
        run.compute_bytes,
        run.attention,
        run.max_tokens,
        gated=model.gated,
        qk_norm=model.qk_norm,
        layer_norm=model.layer_norm,
    )
    if run.adapter_bytes == run.compute_bytes:
        return tokens * per_token
    return tokens * per_token + sum(f.trained + f.frozen for f in held) * run.compute_bytes


def _overhead(run: RunShape, used: int) -> Term:
    if run.device == "cpu":
        return Term("process", PROCESS_BYTES, "Python and its libraries, fitted to runs on CPU")
    fragments = round(CUDA_FRAGMENTATION * used)
    return Term(
        "CUDA context and fragmentation",
        CUDA_CONTEXT_BYTES + fragments,
        f"{format_bytes(CUDA_CONTEXT_BYTES)} + {CUDA_FRAGMENTATION:.0%} of the above",
        is_measured=False,
    )
