"""Stored tensors and their places in the model, by transformers' own rules."""

import multiprocessing
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig

from qlora_lite.export.merge import MergedWeights, write
from qlora_lite.export.trained_layers import MergeSource, TrainedLayers
from qlora_lite.foundation.device import choose
from qlora_lite.foundation.errors import BaseModelError
from qlora_lite.methods.lora import LoRA
from qlora_lite.model.base_files import BaseFiles
from qlora_lite.model.conversion import Part, Place
from qlora_lite.model.facts import facts_of, read_facts
from qlora_lite.model.load import load_base
from qlora_lite.model.settings import Base
from qlora_lite.shards.reader import SafetensorsCheckpoint
from qlora_lite.shards.writer import ShardWriter, TensorSpec
from tests.export.test_merge_memory import anonymous_bytes
from tests.families import tiny_config, tiny_of


def saved(family: str, folder: Path, **changes) -> Base:
    tiny_of(family, **changes).save_pretrained(folder)
    return Base(model=str(folder))


def rewritten(folder: Path, change) -> None:
    """Change the names and tensors of a saved model."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def places_of(base: Base) -> dict[str, Place]:
    return read_facts(base).places(SafetensorsCheckpoint.open(base.model))


def test_the_experts_of_mixtral_are_parts_of_a_fused_parameter(tmp_path):
    places = places_of(saved("mixtral", tmp_path))
    stored, ours = "model.layers.1.block_sparse_moe", "model.layers.1.mlp"
    gate_up, down = f"{ours}.experts.gate_up_proj", f"{ours}.experts.down_proj"
    assert {name: place for name, place in places.items() if name.startswith(stored)} == {
        f"{stored}.gate.weight": Place(f"{ours}.gate.weight"),
        **{f"{stored}.experts.{i}.w1.weight": Place(gate_up, Part(i, 0, 128)) for i in range(4)},
        **{f"{stored}.experts.{i}.w2.weight": Place(down, Part(i, 0, 64)) for i in range(4)},
        **{f"{stored}.experts.{i}.w3.weight": Place(gate_up, Part(i, 128, 256)) for i in range(4)},
    }


def test_twelve_experts_are_in_the_order_of_their_numbers(tmp_path):
    places = places_of(saved("qwen3_moe", tmp_path, num_local_experts=12))
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    assert [places[name.format(i)].part.expert for i in range(12)] == list(range(12))


def test_the_head_of_gpt_neox_is_stored_as_embed_out(tmp_path):
    assert places_of(saved("gpt_neox", tmp_path))["embed_out.weight"] == Place("lm_head.weight")


def test_a_name_of_the_model_is_not_changed_by_a_rule_for_another_layout(tmp_path):
    """transformers' rule for the names of DeepSeek's own files also fits one that it saves."""
    places = places_of(saved("deepseek_v4", tmp_path))
    assert places["model.norm.weight"] == Place("model.norm.weight")


def test_concatenated_rows_have_their_places(tmp_path):
    places = places_of(saved("olmo_hybrid", tmp_path))
    parts = [p.part for p in places.values() if p.part is not None]
    assert parts
    assert all(part.expert is None for part in parts)
    assert len({part.start for part in parts}) == 3  # queries, keys, values


@pytest.mark.parametrize("damage", ["missing", "too many"])
def test_a_checkpoint_with_another_number_of_experts_is_refused(tmp_path, damage):
    base = saved("mixtral", tmp_path)
    prefix = "model.layers.0.block_sparse_moe.experts"

    def change(tensors):
        if damage == "missing":
            del tensors[f"{prefix}.3.w2.weight"]
        else:
            tensors[f"{prefix}.4.w2.weight"] = tensors[f"{prefix}.3.w2.weight"].clone()
        return tensors

    rewritten(tmp_path, change)
    words = r"some are missing" if damage == "missing" else r"experts\.4\.w2\.weight has shape"
    with pytest.raises(BaseModelError, match=words):
        places_of(base)


def test_a_layout_that_is_not_supported_is_refused_with_what_is_missing(tmp_path):
    base = saved("hrm_text", tmp_path)
    with pytest.raises(BaseModelError, match=r"another layout .*converts with Chunk"):
        places_of(base)
    with pytest.raises(BaseModelError, match="another layout"):
        facts_of(tiny_config("hrm_text")).conversion.require_supported()


def test_the_tensors_of_other_towers_are_not_loaded_and_are_copied_by_a_merge(tmp_path):
    """Qwen3.5 in the layout of its hub repositories, with an image tower and an extra layer."""
    saved("qwen3_5", tmp_path / "base")
    others = {"model.visual.patch.weight": torch.randn(3, 4), "mtp.fc.weight": torch.randn(2, 2)}

    def change(tensors):
        found = {
            name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()
        }
        return found | {name: tensor.bfloat16() for name, tensor in others.items()}

    rewritten(tmp_path / "base", change)
    base = Base(model=str(tmp_path / "base"))
    places = places_of(base)
    name = "model.language_model.embed_tokens.weight"
    assert places[name] == Place("model.embed_tokens.weight")
    assert not places.keys() & others.keys()
    load_base(base, choose("cpu"))
    merged = merge_of(base, tmp_path / "merged")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert merged.keys() == stored.keys()
    assert all(torch.equal(merged[name], stored[name]) for name in others)


def merge_of(base: Base, out: Path) -> dict[str, torch.Tensor]:
    """A merge on the original base with an adapter that changes one layer."""
    facts = read_facts(base)
    spec = facts.specs[0]
    state = {
        f"{spec.path}.a": torch.randn(2, spec.d_in),
        f"{spec.path}.b": torch.randn(spec.d_out, 2),
    }
    settings = LoRA(rank=2, targets=[spec.path])
    files = BaseFiles.of(Path(base.model))
    source = MergeSource(base, facts, files, choose("cpu"), settings, state, 0)
    write(MergedWeights(TrainedLayers(source, "original")), out)
    return load_file(out / "model.safetensors")


LARGE = MixtralConfig(
    vocab_size=256,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    num_local_experts=16,
    pad_token_id=0,
)
EXPERT_BYTES = 1024 * 2048 * 2
SCRATCH_BYTES = 24 * 2**20
"""Chunks of the linear layers that are quantised, and the allocator's."""


def save_large(folder: Path) -> None:
    """A layer with experts of 200 MB in bf16, under the names of Mixtral's checkpoints."""
    LARGE.save_pretrained(folder)
    prefix, width, ff = "model.layers.0", LARGE.hidden_size, LARGE.intermediate_size
    shapes = {"model.embed_tokens.weight": (256, width), "lm_head.weight": (256, width)}
    shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    for name in ("model.norm", f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"):
        shapes[f"{name}.weight"] = (width,)
    shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (LARGE.num_local_experts, width)
    for i in range(LARGE.num_local_experts):
        expert = f"{prefix}.block_sparse_moe.experts.{i}"
        shapes |= {f"{expert}.w{part}.weight": (ff, width) for part in (1, 3)}
        shapes[f"{expert}.w2.weight"] = (width, ff)
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    with ShardWriter(folder, specs, "random") as writer:
        for spec in writer.pending:
            writer.write(spec.name, torch.randn(spec.shape).bfloat16() * 0.02)


def peak_of_loading(folder: Path) -> None:
    """Run in a fresh process: load a tiny base to warm up, then the large one."""
    torch.set_num_threads(1)
    rule = choose("cpu")
    saved("mixtral", folder / "tiny")
    load_base(Base(model=str(folder / "tiny")), rule)
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_base(Base(model=str(folder / "large")), rule).model
    done.set()
    watcher.join()
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    (folder / "peak").write_text(f"{peak - before} {held}")


@pytest.mark.slow
def test_loading_experts_takes_the_model_and_at_most_one_expert_of_memory(tmp_path):
    save_large(tmp_path / "large")
    child = multiprocessing.get_context("spawn").Process(target=peak_of_loading, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
    peak, held = map(int, (tmp_path / "peak").read_text().split())
    assert held > 48 * EXPERT_BYTES  # all experts are there
    assert peak - held <= EXPERT_BYTES + SCRATCH_BYTES
