"""One adapter layer on a random weight, or a tiny model that takes real training steps.

layer = one_layer(SoRA(rank=4), d_out=33, d_in=48, quant=NF4())
bench = Bench(save_tiny(tmp_path / "base"), SoRA(rank=4))
losses = [bench.step() for _ in range(5)]
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qlora_lite.adapters.attach import attach, build_layer
from qlora_lite.adapters.files import save_adapter
from qlora_lite.adapters.layer import AdapterLayer
from qlora_lite.adapters.method import AdapterSettings, Method
from qlora_lite.adapters.plan import plan_adapter, plan_layers
from qlora_lite.adapters.split_state import SplitState
from qlora_lite.data.collate import Batch, make_batch, make_bin
from qlora_lite.data.examples import Example
from qlora_lite.foundation import device
from qlora_lite.methods.catalogue import METHODS
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.checkpointing import enable_checkpointing
from qlora_lite.model.facts import BaseFacts, read_facts
from qlora_lite.model.load import load_base
from qlora_lite.model.quant import NF4, Quant
from qlora_lite.model.quantise import quantise
from qlora_lite.model.settings import Base
from qlora_lite.model.targets import LinearSpec
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.optimizer import AdamW
from qlora_lite.training.settings import Optim
from qlora_lite.training.step import StepResult, optimizer_step, prepare_step
from tests.tiny import VOCABULARY

CPU = device.choose("cpu")
IDS = torch.arange(5, 45).view(2, 20)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Between two orders of fp32 sums."""
POSITIONS = torch.arange(20).expand(2, 20)


def one_layer(
    settings: AdapterSettings,
    d_out: int,
    d_in: int,
    quant: Quant | None = None,
    *,
    method: type[Method] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdapterLayer:
    """A method's initialised layer on a random frozen weight without bias.

    Its method is `layer.method`, with its plan made and its layers set.
    """
    draw = torch.Generator().manual_seed(seed)
    dense = torch.randn(d_out, d_in, generator=draw) / d_in**0.5
    spec = LinearSpec("blocks.0.linear", d_in, d_out, 0, 1, "other")
    made = (method or METHODS[type(settings)])(settings)
    plan = plan_layers(made, [spec])
    splits = SplitState(made, plan, seed)
    base = quantise(dense, quant or NF4(), CPU, split=splits.split(spec.path))
    layer = build_layer(base, spec, splits, dtype)
    made.set_layers({spec.path: layer})
    object.__setattr__(layer, "method", made)
    object.__setattr__(layer, "plan", plan.layers[spec.path])
    return layer


def perturb(layer: AdapterLayer, size: float = 0.05, seed: int = 1) -> AdapterLayer:
    """Noise in every trained parameter, as if it had been trained."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in layer.trained().values():
        noise = torch.randn(parameter.shape, generator=draw)
        parameter.data += (size * noise).to(parameter.dtype)
    return layer


class Bench:
    """A tiny model with an adapter, trained by the real optimizer step."""

    def __init__(
        self,
        directory: Path,
        settings: AdapterSettings,
        quant: Quant | None = None,
        *,
        method: type[Method] | None = None,
        total: int = 20,
        lr: float = 1e-2,
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
        rows: int = 2,
        max_grad_norm: float = 1.0,
        weight_decay: float = 0.0,
        seed: int = 0,
        saved: dict[str, Tensor] | None = None,
        repeats_data: bool = False,
        engine: Callable[[AdamW, torch.dtype], TorchEngine] = TorchEngine,
    ) -> None:
        self.repeats_data = repeats_data
        self.total, self.rows, self.max_grad_norm = total, rows, max_grad_norm
        self.optim = Optim(lr=lr, schedule="constant", warmup=0)
        self.seed = seed
        self.number = 0
        self.method = (method or METHODS[type(settings)])(settings)
        base = Base(model=str(directory), quant=quant or NF4())
        facts = _facts_of(str(directory))
        self.plan = plan_adapter(self.method, facts)
        splits = SplitState(self.method, self.plan, seed, saved)
        self.base = load_base(base, CPU, facts=facts, split=splits.split)
        self.attached = attach(self.base.model, self.method, self.plan, seed, dtype, splits)
        if saved is not None:
            self.attached.load_state(saved)
        if checkpointing:
            enable_checkpointing(self.base.model)
        self.model = CausalModel(self.base.model)
        self.optimizer = AdamW(
            self.attached.groups(),
            weight_decay=weight_decay,
            betas=(0.9, 0.999),
            eps=1e-8,
            states="32bit",
            rounding="master",
        )
        self.engine = engine(self.optimizer, torch.float32)
        self.result: StepResult | None = None

    def step(self) -> float:
        """Take the next optimizer step, over two micro-batches; return its mean loss."""
        self.attached.train()
        info = prepare_step(self.method, self.optim, self.seed, self.number, self.total)
        batches = list(batches_of(0 if self.repeats_data else self.number, self.rows))
        self.result = optimizer_step(
            self.model, batches, self.attached, self.engine, info, self.max_grad_norm, _no_check
        )
        self.number += 1
        return self.result.loss

    def save(self, folder: Path) -> Path:
        """Write the adapter's files into a new folder."""
        folder.mkdir()
        save_adapter(
            folder,
            self.attached,
            base=str(self.base.files.directory),
            revision=None,
            sidecar={"adapter": self.method.settings.model_dump(mode="json")},
        )
        return folder

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(rows, tokens, vocabulary) of `IDS`, in evaluation."""
        self.attached.train(False)
        return self.model.logits(self.model.hidden(IDS, POSITIONS))


def perturbed(
    directory: Path, settings: AdapterSettings, dtype: torch.dtype = torch.bfloat16
) -> Bench:
    """A bench with noise in every trained parameter, as if it had been trained."""
    bench = Bench(directory, settings, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    for parameter in bench.attached.parameters().values():
        noise = torch.randn(parameter.shape, generator=draw)
        parameter.data += (0.05 * noise).to(parameter.dtype)
    return bench


def assert_resumes_exactly(make: Callable[..., Bench], steps: int = 6) -> None:
    """A bench continued from the state after half its steps ends with the bits of an unbroken one.

    Args:
        make: a new bench; takes `saved`, the adapter's state.
    """
    uninterrupted, first = make(), make()
    losses = [uninterrupted.step() for _ in range(steps)]
    for _ in range(steps // 2):
        first.step()
    second = make(saved=first.attached.state())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.method.load_state_dict(first.method.state_dict())
    second.number = first.number
    assert [second.step() for _ in range(steps - steps // 2)] == losses[steps // 2 :]
    found = second.attached.state()
    assert all(torch.equal(found[n], t) for n, t in uninterrupted.attached.state().items())


@torch.no_grad()
def plain_logits(model: torch.nn.Module) -> Tensor:
    """The logits of `Bench.logits`, for a model of transformers or PEFT."""
    return model.eval()(input_ids=IDS, position_ids=POSITIONS, use_cache=False).logits


def batches_of(step: int, rows: int) -> Iterator[Batch]:
    """Two micro-batches of random ids, the same for the same step."""
    draw = torch.Generator().manual_seed(step)
    for _ in range(2):
        ids = torch.randint(5, VOCABULARY, (rows, 12), generator=draw, dtype=torch.int32)
        mask = torch.arange(12) >= 3
        yield make_batch([make_bin([Example(row, mask, 0)]) for row in ids])


@cache
def _facts_of(directory: str) -> BaseFacts:
    return read_facts(Base(model=directory))


def _no_check(loss: float, batch: Batch) -> None:
    """Accept any loss: the model is random."""
