"""Merging: the written model computes what the trained one does, with every adapter tensor used."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_lite.export import trained_layers
from qlora_lite.export.directory import write_companions
from qlora_lite.export.merge import MergedWeights, write
from qlora_lite.export.trained_layers import TrainedLayers
from qlora_lite.export.verify import compare, sample_logits
from qlora_lite.foundation.errors import ExportError, RunError
from qlora_lite.methods.catalogue import METHODS
from qlora_lite.methods.lora import LoRA, LoRALayer, LoRAMethod
from qlora_lite.methods.rslora import RsLoRA
from qlora_lite.model.quant import BF16, FP4, FP32, NF4, Int8
from tests.export.trained import Trained, batches, stored, train_a_little
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

processes = multiprocessing.get_context("forkserver")
"""Children of a process that has the imports already, and no threads of its own."""
processes.set_forkserver_preload([__name__])

EVERYTHING = LoRA(rank=4, alpha=8, train_norms=True, embedding_rank=3)


def write_directory(trained: Trained, out: Path, base="trained", dtype=None, **shard) -> Path:
    """Write the weights and the other files that a loader needs."""
    weights = MergedWeights(TrainedLayers(trained.source, base), dtype)
    write(weights, out, **shard)
    is_tied = False if weights.untied else None
    write_companions(
        out,
        trained.source.files.directory,
        tiny_tokenizer(),
        dtype=weights.dtype,
        is_tied=is_tied,
        end_ids=[1],
        with_code=False,
    )
    return out


def plain_logits(directory: Path) -> Tensor:
    """Logits at the same tokens, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    batch = batches()[0]
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return output.logits[batch.targets != -100]


@pytest.mark.parametrize("quant", [NF4(), FP4(double_quant=False), Int8(), BF16(), FP32()])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("qwen3", False)]
)
def test_the_written_model_has_the_logits_of_the_adapter_on_its_base(tmp_path, family, tied, quant):
    trained = train_a_little(tmp_path / "base", quant, family=family, tied=tied)
    expected = sample_logits(trained.causal, batches())
    with trained.attached.disabled():
        base_logits = sample_logits(trained.causal, batches())
    out = write_directory(trained, tmp_path / "out", dtype=torch.float32)
    found = plain_logits(out)
    assert compare(expected, found).relative_error < 1e-4
    assert compare(expected, base_logits).relative_error > 1e-2, "the adapter does nothing"


@pytest.mark.parametrize("head", ["int8", "nf4"])
def test_a_quantised_head_is_merged_as_training_used_it(tmp_path, head):
    trained = train_a_little(tmp_path / "base", head=head)
    out = write_directory(trained, tmp_path / "out", dtype=torch.float32)
    expected = sample_logits(trained.causal, batches())
    assert compare(expected, plain_logits(out)).relative_error < 1e-4


@pytest.mark.parametrize(
    ("family", "tied", "adapter"),
    [
        ("llama", False, EVERYTHING),
        ("llama", True, EVERYTHING),
        ("gpt2", True, EVERYTHING),
        ("gemma3_text", True, LoRA(rank=4, embedding_rank=3)),
        ("llama", False, LoRA(rank=4, train_modules=["lm_head", "model.layers.0.mlp.up_proj"])),
        ("llama", True, LoRA(rank=4, train_modules=["lm_head"])),
        ("llama", True, LoRA(rank=4, train_modules=["embed_tokens"])),
        ("gpt2", True, LoRA(rank=4, train_modules=["transformer.h.1.mlp.c_fc", "wpe"])),
        ("llama", True, LoRA(rank=4, targets=["lm_head", "q_proj"])),
        ("llama", False, RsLoRA(rank=4, ranks={"0": 8, "*.1.mlp.*": 0}, dropout=0.3)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_everything_that_is_trained_is_merged(tmp_path, family, tied, adapter):
    trained = train_a_little(tmp_path / "base", NF4(), adapter, family=family, tied=tied)
    expected = sample_logits(trained.causal, batches())
    out = write_directory(trained, tmp_path / "out", dtype=torch.float32)
    assert compare(expected, plain_logits(out)).relative_error < 1e-4


def test_the_original_base_gets_w_plus_scaled_b_a_rounded_once(tmp_path):
    trained = train_a_little(tmp_path / "base", NF4(), dtype=torch.bfloat16)
    out = write_directory(trained, tmp_path / "out", "original")
    before, after, state = stored(tmp_path / "base"), stored(out), trained.source.state
    for name, tensor in after.items():
        path = name.removesuffix(".weight")
        expected = before[name]
        if f"{path}.a" in state:
            delta = 8 / 4 * state[f"{path}.b"].double() @ state[f"{path}.a"].double()
            expected = (before[name].double() + delta).to(torch.bfloat16)
            assert (tensor != before[name]).any()
        # fp32 sums may fall on the other side of a rounding border
        assert_close(tensor, expected, rtol=2**-7, atol=0)
        assert (tensor == expected).float().mean() > 0.999, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_b_zero_the_original_tensors_come_out_byte_for_byte(tmp_path, family, dtype):
    model = tiny_model(family, dtype=dtype)
    for parameter in model.parameters():
        parameter.data[..., ::3] = -0.0
    model.save_pretrained(tmp_path / "base")
    adapter = LoRA(rank=4, embedding_rank=3)
    trained = train_a_little(tmp_path / "base", NF4(), adapter, noise=0)
    out = write_directory(trained, tmp_path / "out", "original")
    before, after = stored(tmp_path / "base"), stored(out)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("quant", [NF4(), Int8()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_b_zero_the_trained_base_is_the_dequantised_one_cast_once(tmp_path, quant, dtype):
    trained = train_a_little(tmp_path / "base", quant, noise=0)
    after = stored(write_directory(trained, tmp_path / "out", dtype=dtype))
    for path, layer in trained.attached.layers.items():
        assert torch.equal(after[f"{path}.weight"], layer.base.dense().to(dtype))


def test_embedding_and_head_are_rounded_as_in_training(tmp_path):
    trained = train_a_little(tmp_path / "base", NF4())
    before = stored(tmp_path / "base")
    after = stored(write_directory(trained, tmp_path / "out", dtype=torch.float32))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name].bfloat16().float())
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_tied_embeddings_stay_tied(tmp_path):
    trained = train_a_little(tmp_path / "base", NF4(), tied=True)
    out = write_directory(trained, tmp_path / "out")
    assert "lm_head.weight" not in stored(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_an_adapted_embedding_leaves_a_tied_head_unchanged(tmp_path):
    adapter = LoRA(rank=4, embedding_rank=3)
    trained = train_a_little(tmp_path / "base", NF4(), adapter, tied=True)
    out = write_directory(trained, tmp_path / "out", "original")
    before, after = stored(tmp_path / "base"), stored(out)
    table = "model.embed_tokens.weight"
    assert torch.equal(after["lm_head.weight"], before[table])
    assert not torch.equal(after[table], before[table])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_names_without_the_decoders_prefix_are_kept_and_load(tmp_path):
    """GPT-2 on the hub is saved without its language-model head."""
    save_tiny(tmp_path / "base", "gpt2", tied=True)
    tiny_model("gpt2", tied=True).transformer.save_pretrained(tmp_path / "base")
    adapter = LoRA(rank=4, embedding_rank=3)
    trained = train_a_little(tmp_path / "base", NF4(), adapter)
    out = write_directory(trained, tmp_path / "out", dtype=torch.float32)
    assert list(stored(out))[:-1] == list(stored(tmp_path / "base"))
    expected = sample_logits(trained.causal, batches())
    assert compare(expected, plain_logits(out)).relative_error < 1e-4


def test_shards_of_the_base_do_not_matter_and_written_shards_are_bounded(tmp_path):
    one = train_a_little(tmp_path / "one", NF4())
    three = train_a_little(tmp_path / "three", NF4(), num_shards=3)
    whole = stored(write_directory(one, tmp_path / "whole", dtype=torch.bfloat16))
    out = write_directory(three, tmp_path / "parts", dtype=torch.bfloat16, max_shard_bytes=60_000)
    parts = stored(out)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in parts.values())
    assert len(set(index["weight_map"].values())) > 2
    assert plain_logits(out).isfinite().all()


def test_large_tensors_are_merged_in_chunks_to_the_same_bytes(tmp_path, monkeypatch):
    trained = train_a_little(tmp_path / "base", NF4(), EVERYTHING, family="gpt2", tied=True)
    whole = stored(write_directory(trained, tmp_path / "whole"))
    monkeypatch.setattr(trained_layers, "CHUNK_WEIGHTS", 500)
    chunked = stored(write_directory(trained, tmp_path / "chunked"))
    for name in whole:
        # products of other shapes may differ in the last bit
        assert_close(chunked[name], whole[name], rtol=0, atol=1e-6)


def merge_until(directory: Path, out: Path, base: str, share: float) -> None:
    """Run in a child process, which kills itself after a share of the bytes."""
    weights = MergedWeights(TrainedLayers(train_a_little(directory, NF4()).source, base))
    write(
        weights,
        out,
        80_000,
        lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done > share * total else None,
    )


@pytest.mark.parametrize("base", ["trained", "original"])
def test_a_killed_merge_continues_and_writes_the_same_bytes(tmp_path, base, monkeypatch):
    trained = train_a_little(tmp_path / "base", NF4())
    once, twice = tmp_path / "once", tmp_path / "twice"
    weights = MergedWeights(TrainedLayers(trained.source, base))
    write(weights, once, 80_000)
    for share in (0.2, 0.7):
        child = processes.Process(target=merge_until, args=(tmp_path / "base", twice, base, share))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    written = []
    chunks = MergedWeights.chunks
    monkeypatch.setattr(
        MergedWeights, "chunks", lambda self, name: written.append(name) or chunks(self, name)
    )
    write(weights, twice, 80_000)
    sizes = {spec.name: spec.num_bytes for spec in weights.specs}
    assert 0 < sum(sizes[name] for name in written) < 0.4 * sum(sizes.values())
    assert files(twice) == files(once)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_base_quantised_by_bitsandbytes_is_merged_and_has_no_original_base(tmp_path):
    save_tiny(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    packed.save_pretrained(tmp_path / "base")
    trained = train_a_little(tmp_path / "base", NF4(double_quant=False))
    out = write_directory(trained, tmp_path / "out", dtype=torch.float32)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    expected = sample_logits(trained.causal, batches())
    assert compare(expected, plain_logits(out)).relative_error < 1e-4
    with pytest.raises(ExportError, match="base=trained"):
        TrainedLayers(trained.source, "original")


def test_too_little_disk_space_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    trained = train_a_little(tmp_path / "base", NF4())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.used, 10_000)
    )
    with pytest.raises(RunError, match="are free"):
        write(MergedWeights(TrainedLayers(trained.source, "trained")), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_method_that_overrides_merged_is_merged_with_it(tmp_path, monkeypatch):
    """As DoRA does, which rescales the weight, so that W + delta would be wrong."""

    class Doubled(LoRALayer):
        def combine(self, x, y_base):
            return 2 * (y_base + self.update(x))

        def merged(self, dense):
            return 2 * super().merged(dense)

    class DoubledMethod(LoRAMethod):
        def build(self, base, spec, plan, start, generator):
            layer = super().build(base, spec, plan, start, generator)
            return Doubled(base, layer.a.data, layer.b.data, layer.scale)

    monkeypatch.setitem(METHODS, LoRA, DoubledMethod)
    trained = train_a_little(tmp_path / "base", NF4(), family="gpt2", tied=True)
    out = write_directory(trained, tmp_path / "out", dtype=torch.float32)
    expected = sample_logits(trained.causal, batches())
    assert compare(expected, plain_logits(out)).relative_error < 1e-4


def test_a_merge_of_other_weights_has_another_identity(tmp_path):
    """So that an unfinished merge is continued by the same one only."""
    source = train_a_little(tmp_path / "base").source
    rule = source.rule
    others = [
        source,
        *(
            replace(source, rule=replace(rule, **{name: torch.float16}))
            for name in ("compute", "storage", "norms")
        ),
        replace(source, seed=source.seed + 1),
        replace(source, adapter=source.adapter.model_copy(update={"alpha": 9})),
        replace(source, base=source.base.model_copy(update={"head": "int8"})),
        replace(source, state={n: t + 1 for n, t in source.state.items()}),
    ]
    weights = [MergedWeights(TrainedLayers(other, "trained"), None) for other in others]
    weights.append(MergedWeights(TrainedLayers(source, "original"), None))
    weights.append(MergedWeights(TrainedLayers(source, "trained"), torch.float16))
    assert len({one.identity for one in weights}) == len(weights)
    again = MergedWeights(TrainedLayers(source, "trained"), None)
    assert again.identity == weights[0].identity
