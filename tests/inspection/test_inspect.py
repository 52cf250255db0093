"""`inspect` on runs and adapters, compared with dense matrices and numpy."""

import json
import shutil
import sys

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_lite.foundation.errors import AdapterError, ExportError, QloraLiteError, RunError
from qlora_lite.foundation.watcher import Watcher
from qlora_lite.inspection.inspect import inspect, write_figures
from qlora_lite.run.loading import load_run
from qlora_lite.run.training import run_recipe
from tests.end_to_end.small_run import small_recipe, write_rows
from tests.tiny import save_tiny

SIX_DIGITS = 1e-5
"""Values are kept with six digits."""
TOP = 5e-3
"""`top_norm` is computed by iteration."""
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Listener(Watcher):
    """Records notes and progress."""

    def __init__(self):
        self.notes, self.bytes = [], []

    def note(self, text):
        self.notes.append(text)

    def loading(self, done_bytes, total_bytes):
        self.bytes.append((done_bytes, total_bytes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Short runs on one base, and a PEFT adapter."""
    folder = tmp_path_factory.mktemp("inspecting")
    base, rows = save_tiny(folder / "base"), write_rows(folder / "rows.jsonl")
    changes = {
        "rank-4": (),
        "rank-8": ("adapter.rank=8", "seed=1", "adapter.targets=attention"),
        "dora": ("adapter=dora",),
        "adalora": ("adapter=adalora", "adapter.target_rank=1"),
        "pissa": ("adapter=pissa", "adapter.mode=requantise"),
        "wide": ("adapter.embedding_rank=3", "adapter.train_norms=true"),
    }
    for name, own in changes.items():
        short = ("optim.steps=4", "data.heldout_share=0")
        run_recipe(small_recipe(base, rows, folder / name, *own, *short))
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    model.save_pretrained(folder / "peft")
    return folder


def look(folder, *names, **options):
    return inspect([folder / name for name in names], **options)


def rows_of(folder, name, **options):
    (report,) = look(folder, name, **options).targets
    return {row.path: row for row in report.layers}


def check_row(row, delta, weight, rank):
    """Compare one row with dense matrices in fp64; `rank` is the one of amplification."""
    delta, weight = delta.detach().double().numpy(), weight.detach().double().numpy()
    u, values, vh = np.linalg.svd(delta, full_matrices=False)
    assert row.shape == delta.shape
    found = np.array(row.singular_values)
    # a dense delta is decomposed in fp32, whose rounding is relative to the largest value
    assert found == pytest.approx(values[: len(found)], rel=SIX_DIGITS, abs=1e-6 * values[0])
    shares = values[values > 0] / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert row.effective_rank == pytest.approx(expected, rel=SIX_DIGITS)
    norm, whole = np.linalg.norm(delta), np.linalg.norm(weight)
    assert row.norm == pytest.approx(norm, rel=SIX_DIGITS)
    assert row.weight_norm == pytest.approx(whole, rel=SIX_DIGITS)
    assert row.relative_norm == pytest.approx(norm / whole, rel=SIX_DIGITS)
    there = np.linalg.norm(u[:, :rank].T @ weight @ vh[:rank].T)
    assert row.amplification.rank == rank
    assert row.amplification.weight_there == pytest.approx(there, rel=1e-4)
    assert row.amplification.factor == pytest.approx(norm / there, rel=1e-4)
    own = np.linalg.norm(np.linalg.svd(weight, compute_uv=False)[:rank])
    assert row.amplification.weight_at_top == pytest.approx(own, rel=TOP)
    by_chance = rank * whole / (delta.shape[0] * delta.shape[1]) ** 0.5
    assert row.amplification.weight_by_chance == pytest.approx(by_chance, rel=SIX_DIGITS)


@pytest.mark.parametrize("name", ["rank-4", "dora", "pissa"])
def test_every_row_of_a_run_matches_its_loaded_model(folder, name):
    layers = load_run(folder / name).attached.layers
    rows = rows_of(folder, name)
    assert list(rows) == list(layers)
    for path, row in rows.items():
        check_row(row, layers[path].delta(), layers[path].base.dense(), rank=4)
        assert row.rank == 4
        assert row.gates is None


def test_a_pair_keeps_its_rank_and_a_dense_delta_that_of_the_weight(folder):
    assert {row.kept_rank for row in rows_of(folder, "rank-4").values()} == {4}
    assert rows_of(folder, "dora")[Q_PROJ].kept_rank == 64
    assert len(rows_of(folder, "dora")[Q_PROJ].singular_values) == 64


def test_a_start_subtracted_from_the_weights_is_a_note(folder):
    (report,) = look(folder, "pissa").targets
    assert "before quantisation" in report.notes[0]


def test_an_embedding_has_a_row_and_fully_trained_tensors_have_none(folder):
    (report,) = look(folder, "wide").targets
    (row,) = (row for row in report.layers if row.path == "model.embed_tokens")
    (embedding,) = load_run(folder / "wide").attached.embeddings.values()
    check_row(row, embedding.delta().T, embedding.base.dense().T, rank=3)
    assert "fully trained tensors are not shown: 5" in report.notes[0]


def test_top_limits_the_directions_of_amplification(folder):
    layers = load_run(folder / "dora").attached.layers
    for path, row in rows_of(folder, "dora", top=2).items():
        check_row(row, layers[path].delta(), layers[path].base.dense(), rank=2)
    assert rows_of(folder, "rank-4", top=50)[Q_PROJ].amplification.rank == 4


def test_a_peft_adapter_has_norms_from_its_recorded_base(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(model, folder / "peft").base_model.model
    for path, row in rows_of(folder, "peft").items():
        module = model.get_submodule(path)
        check_row(row, module.get_delta_weight("default"), module.base_layer.weight, rank=4)


def test_an_adapter_that_learned_nothing_has_a_delta_of_zero(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "fresh"
    )
    inspection = look(tmp_path, "fresh", "fresh")
    row = inspection.targets[0].layers[0]
    assert (row.kept_rank, row.effective_rank, row.norm, row.relative_norm) == (0, 0, 0, 0)
    assert row.amplification is None
    assert inspection.comparisons[0].layers[0].left == ()
    write_figures(inspection, tmp_path / "figures")


def test_a_fully_pruned_layer_has_rank_0(folder, tmp_path):
    inspection = look(folder, "adalora", "rank-4")
    rows = {row.path: row for row in inspection.targets[0].layers}
    kept = {path: sum(gate != 0 for gate in row.gates) for path, row in rows.items()}
    assert {path: row.kept_rank for path, row in rows.items()} == kept
    assert 0 in kept.values()
    assert sum(kept.values()) == len(rows)
    write_figures(inspection, tmp_path / "figures")


# -- phi -------------------------------------------------------------------------------------------


def naive_phi(a1, a2):
    """Equation 4 for every i and j."""
    _, _, v1 = np.linalg.svd(a1.double().numpy(), full_matrices=False)
    _, _, v2 = np.linalg.svd(a2.double().numpy(), full_matrices=False)
    return [
        [np.linalg.norm(v1[:i] @ v2[:j].T) ** 2 / min(i, j) for j in range(1, len(v2) + 1)]
        for i in range(1, len(v1) + 1)
    ]


def test_phi_of_two_ranks_is_that_of_their_own_factors(folder):
    listener = Listener()
    (comparison,) = look(folder, "rank-4", "rank-8", watcher=listener).comparisons
    first, second = (
        load_file(folder / name / "adapter" / "native.safetensors") for name in ("rank-4", "rank-8")
    )
    assert len(comparison.layers) == 8
    for row in comparison.layers:
        assert row.of == "factors"
        right = naive_phi(first[f"{row.path}.a"], second[f"{row.path}.a"])
        left = naive_phi(first[f"{row.path}.b"].T, second[f"{row.path}.b"].T)
        assert (len(row.right), len(row.right[0])) == (4, 8)
        assert np.array(row.right) == pytest.approx(np.array(right), rel=1e-4, abs=1e-6)
        assert np.array(row.left) == pytest.approx(np.array(left), rel=1e-4, abs=1e-6)
    assert any("no phi for 6 layers" in note for note in listener.notes)


def test_phi_of_a_run_and_its_own_peft_adapter_is_one(folder):
    inspection = look(folder, "rank-4", "rank-4/adapter")
    for row in inspection.comparisons[0].layers:
        for grid in (row.right, row.left):
            assert np.diag(grid) == pytest.approx(1)
    first, second = inspection.targets
    norms = [{row.path: row.norm for row in target.layers} for target in (first, second)]
    assert norms[0] == pytest.approx(norms[1], rel=SIX_DIGITS)


def test_methods_without_a_trained_pair_are_compared_by_their_deltas(folder, tmp_path):
    rows = folder / "rows.jsonl"
    melora = ("adapter=melora", "adapter.num_blocks=4", "optim.steps=4")
    run_recipe(small_recipe(folder / "base", rows, tmp_path / "melora", *melora))
    (comparison,) = inspect([folder / "rank-4", tmp_path / "melora"]).comparisons
    deltas = [
        load_run(run).attached.layers[Q_PROJ].delta().detach()
        for run in (folder / "rank-4", tmp_path / "melora")
    ]
    (row,) = (row for row in comparison.layers if row.path == Q_PROJ)
    assert row.of == "delta"
    expected = np.array(naive_phi(*deltas))[: len(row.right), : len(row.right[0])]
    assert np.array(row.right) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_three_targets_are_compared_pairwise(folder):
    inspection = look(folder, "rank-4", "dora", "rank-8")
    assert [(c.first, c.second) for c in inspection.comparisons] == [(0, 1), (0, 2), (1, 2)]


def test_more_directions_than_the_rank_are_refused(folder):
    look(folder, "rank-4", "rank-8", i=4, j=8)
    with pytest.raises(AdapterError, match=r"got 5 directions of .*rank-4.* has 4"):
        look(folder, "rank-4", "rank-8", i=5, j=8)
    with pytest.raises(AdapterError, match=r"got 5 directions of .*rank-4.* has 4"):
        look(folder, "rank-8", "rank-4", i=5)
    with pytest.raises(AdapterError, match="give a second run"):
        look(folder, "rank-4", i=2)


# -- what cannot be compared, or read --------------------------------------------------------------


def test_adapters_of_different_bases_are_not_compared(folder, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    recipe = small_recipe(other, folder / "rows.jsonl", tmp_path / "run", "optim.steps=2")
    run_recipe(recipe)
    with pytest.raises(AdapterError, match=r"has the base .*base.*other"):
        inspect([folder / "rank-4", tmp_path / "run"])
    with pytest.raises(AdapterError, match="phi needs adapters of the same base"):
        inspect([folder / "peft", tmp_path / "run"])


def test_a_given_base_overrides_the_recorded_one(folder, tmp_path):
    shutil.copytree(folder / "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "somewhere/else"
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="--base"):
        inspect([folder / "rank-4", tmp_path / "peft"])
    listener = Listener()
    inspection = inspect(
        [folder / "rank-4", tmp_path / "peft"], base=str(folder / "base"), watcher=listener
    )
    assert len(inspection.comparisons[0].layers) == 4
    assert any("--base has no effect" in note for note in listener.notes)


def save_loralib(file, path=Q_PROJ, d_out=64, d_in=64):
    draw = torch.Generator().manual_seed(2)
    factors = {
        "lora_A": torch.randn(3, d_in, generator=draw),
        "lora_B": torch.randn(d_out, 3, generator=draw),
    }
    torch.save({f"{path}.{name}": tensor for name, tensor in factors.items()}, file)
    return file, factors["lora_B"] @ factors["lora_A"]


def test_different_shapes_are_different_bases(folder, tmp_path):
    file, _ = save_loralib(tmp_path / "lora.pt", d_in=80)
    with pytest.raises(AdapterError, match="different bases"):
        inspect([folder / "rank-4", file])


def test_adapters_without_a_layer_in_common_are_not_compared(folder, tmp_path):
    file, _ = save_loralib(tmp_path / "lora.pt", path="elsewhere")
    with pytest.raises(AdapterError, match="no layer in common"):
        inspect([folder / "rank-4", file])


def test_a_loralib_checkpoint_without_alpha_has_relative_values(folder, tmp_path):
    file, delta = save_loralib(tmp_path / "lora.bin")
    values = np.linalg.svd(delta.numpy(), compute_uv=False)[:3]
    (report,) = inspect([file], base=str(folder / "base")).targets
    (row,) = report.layers
    assert not report.is_scaled
    assert row.singular_values == pytest.approx(values / values[0], rel=1e-4)
    assert row.norm is row.relative_norm is row.amplification.factor is None
    assert row.amplification.weight_there > 0
    (known,) = inspect([file], base=str(folder / "base"), alpha=6).targets[0].layers
    assert known.singular_values == pytest.approx(2 * values, rel=1e-4)
    assert known.relative_norm == pytest.approx(known.norm / known.weight_norm)
    assert known.amplification.factor > 0


def test_a_run_and_a_loralib_checkpoint_are_compared(folder, tmp_path):
    file, _ = save_loralib(tmp_path / "lora.bin")
    (comparison,) = inspect([folder / "rank-4", file]).comparisons
    assert [row.path for row in comparison.layers] == [Q_PROJ]


def test_other_files_are_refused(folder, tmp_path):
    for target in (tmp_path, folder / "base", tmp_path / "nowhere", folder / "rows.jsonl"):
        with pytest.raises(AdapterError, match="neither a run"):
            inspect([target])


def test_an_adapter_folder_without_pairs_is_refused_with_its_run(folder):
    with pytest.raises(AdapterError, match=r"Give the run: .*dora"):
        look(folder, "dora/adapter")
    with pytest.raises(AdapterError, match=r"Give the run: .*pissa"):
        look(folder, "pissa/adapter")


@pytest.mark.parametrize(
    "file", ["recipe.json", "adapter/qlora_lite.json", "adapter/native.safetensors"]
)
@pytest.mark.parametrize("content", [b"", b"\x00" * 50])
def test_a_damaged_run_is_one_clear_error(folder, tmp_path, file, content):
    shutil.copytree(folder / "rank-4", tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(QloraLiteError, match=r"damaged|cannot be read"):
        inspect([tmp_path / "run"])


def test_an_unfinished_run_is_refused(folder, tmp_path):
    shutil.copytree(folder / "rank-4", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(RunError, match="not finished"):
        inspect([tmp_path / "run"])


# -- progress, JSON and figures --------------------------------------------------------------------


def test_the_bytes_read_from_the_bases_add_up(folder):
    listener = Listener()
    look(folder, "rank-4", "peft", watcher=listener)
    done, total = listener.bytes[-1]
    assert done == total > 0
    assert [done for done, _ in listener.bytes] == sorted(done for done, _ in listener.bytes)


def test_the_result_is_json(folder):
    inspection = look(folder, "dora", "rank-4")
    values = json.loads(json.dumps(inspection.to_dict(), allow_nan=False))
    assert values["targets"][1]["layers"][0]["path"] == Q_PROJ
    assert len(values["comparisons"][0]["layers"][0]["right"]) == 4


def test_figures_show_every_target_and_layer_name(folder, tmp_path):
    from matplotlib.image import imread

    write_figures(look(folder, "rank-4", "rank-8"), tmp_path / "figures")
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    expected = {f"{kind}-{number}.png" for kind in ("spectra", "layers") for number in (1, 2)}
    expected |= {f"phi-1-2-{side}-{name}_proj.png" for side in ("left", "right") for name in "qkvo"}
    assert names == expected | {"qlora_lite.json"}
    for file in (tmp_path / "figures").glob("*.png"):
        picture = imread(file)
        assert picture.shape[0] > 200
        assert picture.std() > 0.05


def test_figures_overwrite_nothing(folder, tmp_path):
    (tmp_path / "mine.png").write_text("precious")
    with pytest.raises(ExportError, match="exists already"):
        write_figures(look(folder, "peft"), tmp_path)


def test_figures_without_matplotlib_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ExportError, match="pip install matplotlib"):
        write_figures(look(folder, "peft"), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()
