"""One optimizer step: the order of the hooks, and what a method can change."""

import pytest
import torch
from torch.nn import functional as F

from qlora_lite.adapters.attach import attach
from qlora_lite.adapters.method import StepInfo
from qlora_lite.adapters.plan import plan_adapter
from qlora_lite.data.collate import make_batch, make_bin
from qlora_lite.data.examples import Example
from qlora_lite.foundation import device
from qlora_lite.methods.lora import LoRA, LoRAMethod
from qlora_lite.model.causal import CausalModel
from qlora_lite.model.facts import read_facts
from qlora_lite.model.load import load_base
from qlora_lite.model.settings import Base
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.optimizer import AdamW
from qlora_lite.training.settings import Optim
from qlora_lite.training.step import optimizer_step, prepare_step, seed_dropout
from tests.tiny import save_tiny


class Recorder(LoRAMethod):
    """LoRA that records its calls, and the gradients at each."""

    def __init__(self, settings):
        super().__init__(settings)
        self.calls = []
        self.weight = 0.0
        self.output_weight = 0.0

    def begin_step(self, step):
        self.calls.append(("begin_step", step.step))

    def penalty(self):
        self.calls.append(("penalty",))
        return self.weight * sum(layer.b.float().sum() for layer in self.layers.values())

    def output_loss(self, chunk):
        self.calls.append(("output_loss", len(chunk.targets)))
        return self.output_weight * chunk.logits.sum()

    def before_step(self, access, step):
        self.before = {n: access.gradient(p).clone() for n, p in self._parameters()}
        self.values = {n: access.read(p) for n, p in self._parameters()}
        self.calls.append(("before_step", step.skipped))

    def after_step(self, access, step):
        moved = any(not torch.equal(access.read(p), self.values[n]) for n, p in self._parameters())
        alive = all(access.gradient(p) is not None for _, p in self._parameters())
        self.calls.append(("after_step", moved, alive))

    def _parameters(self):
        for path, layer in self.layers.items():
            for name, parameter in layer.trained().items():
                yield f"{path}.{name}", parameter


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama", "llama")


def model_adapter_engine(directory, engine_class=TorchEngine):
    settings = Base(model=str(directory))
    facts = read_facts(settings)
    base = load_base(settings, device.choose("cpu"), facts=facts)
    method = Recorder(LoRA(rank=2, targets="attention"))
    attached = attach(base.model, method, plan_adapter(method, facts), 0, torch.float32)
    optimizer = AdamW(
        attached.groups(),
        weight_decay=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        states="32bit",
        rounding="master",
    )
    return CausalModel(base.model), attached, engine_class(optimizer, torch.float32)


def batches(*lengths):
    draw = torch.Generator().manual_seed(0)
    for length in lengths:
        ids = torch.randint(5, 400, (length,), generator=draw, dtype=torch.int32)
        mask = torch.arange(length) >= length // 3
        yield make_batch([make_bin([Example(ids, mask, 0)])])


def info():
    return StepInfo(4, 10, 1e-2, torch.Generator().manual_seed(0))


def step(model, attached, engine, lengths):
    seen = []
    result = optimizer_step(
        model, list(batches(*lengths)), attached, engine, info(), 1.0, lambda *a: seen.append(a)
    )
    return result, seen


def test_hooks_are_called_in_the_documented_order(directory):
    model, attached, engine = model_adapter_engine(directory)
    method = attached.method
    result, seen = step(model, attached, engine, [12, 9])
    assert method.calls == [
        ("begin_step", 4),
        ("output_loss", 8),
        ("output_loss", 6),
        ("penalty",),
        ("before_step", False),
        ("after_step", True, True),
    ]
    assert result.num_targets == 14
    assert len(seen) == 2
    assert all(engine.gradient(p) is None for _, p in method._parameters())


class TwoEqualRanks(TorchEngine):
    """A process whose only peer has the same batches."""

    def sum_over_ranks(self, value):
        return 2 * value


def test_tokens_and_targets_are_counted_over_all_ranks(directory):
    alone = model_adapter_engine(directory)
    expected, _ = step(*alone, [12, 9])
    shared = model_adapter_engine(directory, TwoEqualRanks)
    result, _ = step(*shared, [12, 9])
    assert result.num_targets == 2 * expected.num_targets
    assert result.num_tokens == 2 * expected.num_tokens
    assert result.loss == pytest.approx(expected.loss)
    for name, gradient in shared[1].method.before.items():
        torch.testing.assert_close(gradient, alone[1].method.before[name] / 2)


def test_layers_that_are_not_active_do_not_move(directory):
    model, attached, engine = model_adapter_engine(directory)
    method = attached.method
    chosen = sorted(method.layers)[0]
    method.active = lambda info: [chosen]
    method.before_step = lambda access, info: None
    method.after_step = lambda access, info: None
    before = {name: p.detach().clone() for name, p in method._parameters()}
    step(model, attached, engine, [12])
    moved = {name for name, p in method._parameters() if not torch.equal(p, before[name])}
    assert moved == {f"{chosen}.b"}  # A's gradient is zero while B is


def test_a_penalty_is_added_once_for_any_number_of_micro_batches(directory):
    plain = model_adapter_engine(directory)
    step(*plain, [12, 9, 7])
    with_penalty = model_adapter_engine(directory)
    with_penalty[1].method.weight = 0.25
    step(*with_penalty, [12, 9, 7])
    for name, gradient in with_penalty[1].method.before.items():
        expected = plain[1].method.before[name] + (0.25 if name.endswith(".b") else 0.0)
        torch.testing.assert_close(gradient, expected)


def test_a_loss_on_outputs_is_a_mean_over_the_trained_tokens_of_the_step(directory):
    one = model_adapter_engine(directory)
    one[1].method.output_weight = 0.1
    with_loss, _ = step(*one, [12, 9])
    without, _ = step(*model_adapter_engine(directory), [12, 9])
    assert with_loss.loss == pytest.approx(without.loss, rel=1e-6)
    assert without.added == 0
    model = model_adapter_engine(directory)[0]
    expected, count = 0.0, 0
    with torch.no_grad():
        for batch in batches(12, 9):
            hidden = model.hidden(batch.input_ids, batch.position_ids)
            logits = model.logits(hidden)[batch.targets >= 0]
            expected += 0.1 * logits.sum().item()
            count += len(logits)
    assert with_loss.added == pytest.approx(expected / count, rel=1e-3)


def drawn(seed, number):
    """What the second batch of step `number` draws: a dropout mask, and numbers of the method's own
    stream."""
    step = prepare_step(LoRAMethod(LoRA()), Optim(), seed, number, total=10)
    seed_dropout(step, 1)
    return F.dropout(torch.ones(64)), torch.rand(64, generator=step.generator)


@pytest.mark.parametrize("stream", [0, 1], ids=["dropout", "method"])
def test_every_step_and_every_seed_draws_its_own_numbers(stream):
    draws = [drawn(seed, number)[stream] for seed in (0, 1) for number in (0, 1, 2)]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)


def test_a_step_draws_the_same_numbers_whatever_was_drawn_before():
    first = drawn(seed=3, number=7)
    torch.rand(5)
    for found, expected in zip(drawn(seed=3, number=7), first, strict=True):
        assert torch.equal(found, expected)
