"""Properties of every method in training, with the real loader, step, checkpoint and merge.

By default every method runs on NF4; other base precisions are slow tests.
"""

import copy
from dataclasses import asdict
from functools import cache, partial

import peft
import pytest
import torch

from qlora_lite.export.merge import MergedWeights
from qlora_lite.export.trained_layers import MergeSource, TrainedLayers
from qlora_lite.export.verify import candidate
from qlora_lite.methods.loftq import LoftQ
from qlora_lite.model.base_files import BaseFiles
from qlora_lite.model.facts import read_facts
from qlora_lite.model.load import load_base
from qlora_lite.model.settings import Base
from qlora_lite.training import checkpoint
from qlora_lite.training.engine import TorchEngine
from qlora_lite.training.loop import Progress
from tests.dense_twin import dense_twin
from tests.properties.cases import CASES, SAME_TRAINING
from tests.properties.test_layers import FP32_SUMS, QUANTS, UNQUANTISED
from tests.tiny import save_tiny
from tests.workbench import CPU, Bench

IDS = torch.arange(5, 45).view(2, 20)
STEPS = 12


def grid(repeated=()):
    """The whole grid. What is `repeated` is among the slow tests only."""
    for name, case in CASES.items():
        for quant in QUANTS:
            if isinstance(case.settings, LoftQ) and quant in UNQUANTISED:
                continue
            marks = () if quant == "nf4" and name not in repeated else (pytest.mark.slow,)
            yield pytest.param(name, quant, id=f"{name}-{quant}", marks=marks)


every = pytest.mark.parametrize(("name", "quant"), list(grid()))
every_training = pytest.mark.parametrize(("name", "quant"), list(grid(SAME_TRAINING)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "llama")


def bench(directory, name, quant, **changed):
    settings = CASES[name].model_settings
    given = {key: changed.pop(key) for key in list(changed) if key in type(settings).model_fields}
    settings = settings.model_copy(update=given)
    return Bench(directory, settings, QUANTS[quant], **({"total": STEPS} | changed))


@every
def test_every_trained_tensor_learns_and_the_base_does_not_change(directory, name, quant):
    it = bench(directory, name, quant, repeats_data=True)
    before = copy.deepcopy(it.attached.state())
    frozen = {n: p.clone() for n, p in it.base.model.named_parameters() if ".base." in n}
    changed: set[str] = set()
    losses = []
    for _ in range(STEPS):
        losses.append(it.step())
        after = it.attached.state()
        parameters = it.attached.parameters()
        changed |= {n for n in parameters if not torch.equal(after[n], before[n])}
    assert losses[-1] < losses[0] - 0.02
    assert changed == set(parameters)
    for path, base in it.base.model.named_parameters():
        if ".base." in path:
            assert torch.equal(base, frozen[path])
            assert base.grad is None


@every_training
def test_an_interrupted_run_ends_with_the_same_bits(directory, tmp_path, name, quant):
    uninterrupted = bench(directory, name, quant, dropout=0.1)
    losses = [uninterrupted.step() for _ in range(STEPS)]
    first = bench(directory, name, quant, dropout=0.1)
    for _ in range(STEPS // 2):
        first.step()
    state = checkpoint.TrainingState(
        first.attached.state(),
        first.optimizer.state_dict(),
        first.method.state_dict(),
        asdict(Progress(step=first.number)),
    )
    checkpoint.save(tmp_path, first.number, state, keep=1)
    saved = checkpoint.load(checkpoint.newest(tmp_path))
    second = bench(directory, name, quant, dropout=0.1, saved=saved.adapter)
    second.optimizer.load_state_dict(saved.engine)
    second.method.load_state_dict(saved.method)
    second.number = first.number
    assert [second.step() for _ in range(STEPS // 2)] == losses[STEPS // 2 :]
    expected, found = uninterrupted.attached.state(), second.attached.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    moments, others = uninterrupted.optimizer.state_dict(), second.optimizer.state_dict()
    assert all(
        torch.equal(torch.as_tensor(others[k]), torch.as_tensor(moments[k])) for k in moments
    )


@every_training
@pytest.mark.parametrize(
    "overflows",
    [
        pytest.param(0, id="even steps"),
        pytest.param(1, id="odd steps", marks=pytest.mark.slow),
    ],
)
def test_a_step_that_overflowed_changes_nothing(directory, name, quant, overflows):
    it = bench(directory, name, quant, engine=partial(Overflowing, overflows))
    for number in range(STEPS):
        before = copy.deepcopy(it.attached.state())
        it.step()
        after = it.attached.state()
        is_same = before.keys() == after.keys() and all(
            torch.equal(after[key], tensor) for key, tensor in before.items()
        )
        assert is_same == (number % 2 == overflows)


@every_training
def test_checkpointing_changes_no_bit(directory, name, quant):
    half = STEPS // 2  # also the run's length, so that every event of a schedule occurs
    plain = bench(directory, name, quant, total=half)
    checkpointed = bench(directory, name, quant, total=half, checkpointing=True)
    assert [plain.step() for _ in range(half)] == [checkpointed.step() for _ in range(half)]


@every_training
def test_merged_weights_give_the_same_logits(directory, name, quant):
    it = trained(directory, name, quant)
    base = Base(model=str(directory), quant=QUANTS[quant])
    source = MergeSource(
        base,
        read_facts(base),
        BaseFiles.of(directory),
        CPU,
        it.method.settings,
        {key: tensor.clone() for key, tensor in it.attached.state().items()},
        it.seed,
    )
    weights = MergedWeights(TrainedLayers(source, "trained"), torch.float32)
    model = candidate(weights, source.base, CPU)
    with torch.no_grad():
        found = model.logits(model.hidden(IDS, torch.arange(20).expand(2, 20)))
    assert_same_logits(found, it.logits())


@every
def test_plain_peft_gives_the_same_logits(directory, tmp_path, name, quant):
    it = trained(directory, name, quant)
    folder = it.save(tmp_path / "adapter")
    assert (folder / "native.safetensors").exists()
    assert (folder / "adapter_model.safetensors").exists() == CASES[name].peft
    if not CASES[name].peft:
        return
    with it.attached.disabled():
        base_logits = it.logits()
    twin = dense_twin(load_base(Base(model=str(directory), quant=QUANTS[quant]), CPU).model)
    model = peft.PeftModel.from_pretrained(twin, folder).eval()
    with torch.no_grad():
        found = model(IDS).logits
    assert not torch.allclose(it.logits(), base_logits, **FP32_SUMS)
    assert_same_logits(found, it.logits())


@every_training
def test_ranks_may_differ_from_layer_to_layer(directory, name, quant):
    it = bench(directory, name, quant, ranks={"1": 3, "*.0.mlp.down_proj": 0})
    assert "model.layers.0.mlp.down_proj" not in it.attached.layers
    it.step()
    assert it.result.grad_norm > 0
    without = bench(directory, name, quant)
    path = "model.layers.1.self_attn.q_proj"
    counts = [b.attached.layers[path].trainable_count() for b in (it, without)]
    assert counts[0] != counts[1]


class Overflowing(TorchEngine):
    """Skips every other step, as loss scaling does when a gradient is not finite."""

    def __init__(self, overflows, optimizer, compute):
        super().__init__(optimizer, compute)
        self.overflows = overflows

    def step(self, max_norm, step):
        self.skipped = step.step % 2 == self.overflows
        return float("inf") if self.skipped else super().step(max_norm, step)


def assert_same_logits(found, expected):
    """1e-5 of the largest logit, which trained adapters make large: fp32 sums in another order."""
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@cache
def trained(directory, name, quant):
    """A trained bench, for tests that do not change it."""
    it = bench(directory, name, quant, lr=3e-2 / CASES[name].settings.lr_ratio)
    for _ in range(STEPS - 1):
        it.step()
    draw = torch.Generator().manual_seed(1)
    for layer in it.attached.layers.values():
        for parameter in layer.trained().values():
            live = parameter.data != 0  # pruned weights stay zero
            noise = 0.02 * torch.randn(parameter.shape, generator=draw)
            parameter.data += torch.where(live, noise, 0.0)
    it.attached.train(False)
    return it
