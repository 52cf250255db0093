"""The command `inspect` on runs and adapters."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from qlora_lite.analysis.findings import LayerRow
from qlora_lite.cli.inspect import amplification_table, layer_table, phi_table
from qlora_lite.inspection import inspect as inspecting
from tests.cli.workplace import run_command, write_recipe

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_base):
    """A run with another rank and seed."""
    folder = tmp_path_factory.mktemp("other")
    recipe = write_recipe(folder, tiny_base)
    ended = run_command("train", recipe, "adapter.rank=8", "seed=1", "optim.steps=2")
    assert ended.status == 0, ended.err
    return folder / "run"


@pytest.fixture(scope="module")
def loralib(tmp_path_factory):
    """A checkpoint with a layer of the same base."""
    file = tmp_path_factory.mktemp("loralib") / "lora.pt"
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, generator=draw), torch.randn(64, 2, generator=draw)
    torch.save({f"{Q_PROJ}.lora_A": a, f"{Q_PROJ}.lora_B": b}, file)
    return file


def cells(out, name):
    """The cells of the first line that starts with this layer name."""
    return next(line.split()[1:] for line in out.splitlines() if line.split()[:1] == [name])


def test_a_run_has_one_line_per_layer(trained, tiny_base):
    ended = run_command("inspect", trained.run)
    assert ended.status == 0, ended.err
    assert f"{trained.run}: run, adapter=lora, base {tiny_base}" in ended.out
    for heading in ("rank", "kept", "effective", "singular values", "||dW||", "amplified"):
        assert heading in ended.out
    ranks, amplified = ended.out.split("table 4")
    assert ranks.count("_proj") == amplified.count("_proj") == 14
    rank, kept, effective = cells(ended.out, "0.self_attn.q_proj")[:3]
    assert (rank, kept) == ("4", "4")
    assert 1 <= float(effective) <= 4
    assert "gates" not in ended.out
    assert "phi" not in ended.out


def test_two_targets_have_a_table_of_phi(trained, other):
    ended = run_command("inspect", trained.run, other)
    assert ended.status == 0, ended.err
    table = ended.out.partition("phi of ")[2]
    assert "mean" in table
    values = [float(value) for value in cells(table, "0.self_attn.q_proj")]
    assert len(values) == 8
    assert all(0 <= value <= 1 for value in values)
    assert values[3] == values[7] == max(4, 8) / 64


def test_phi_for_one_i_and_j(trained, other):
    ended = run_command("inspect", trained.run, other, "-i", 2, "-j", 6)
    assert ended.status == 0, ended.err
    table = ended.out.partition("phi of ")[2]
    assert table.count("(2,6)") == 2
    assert len(cells(table, "0.self_attn.q_proj")) == 4


def test_phi_of_a_run_with_its_own_adapter_is_one(trained):
    ended = run_command("inspect", trained.run, trained.run / "adapter")
    table = ended.out.partition("phi of ")[2]
    right_1, right_4, *_ = cells(table, "mean")
    assert right_1 == right_4 == "1.000"


def test_without_alpha_singular_values_are_relative(loralib, tiny_base):
    ended = run_command("inspect", loralib)
    assert ended.status == 0, ended.err
    assert "--alpha" in ended.out
    assert "singular values / largest" in ended.out
    assert "||dW||" not in ended.out
    assert cells(ended.out, "q_proj")[3] == "1"
    known = run_command("inspect", loralib, "--alpha", 4, "--base", tiny_base)
    assert known.status == 0, known.err
    assert "||dW||" in known.out
    assert "/ largest" not in known.out
    assert "amplified" in known.out


def test_json_is_written_and_not_overwritten(trained, other, tmp_path):
    file = tmp_path / "new" / "found.json"
    ended = run_command("inspect", trained.run, other, "--json", file)
    assert ended.status == 0, ended.err
    assert str(file) in ended.out
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [target["what"] for target in found["targets"]] == ["run, adapter=lora"] * 2
    row = found["targets"][0]["layers"][0]
    assert row["path"] == Q_PROJ
    assert len(row["singular_values"]) == 4
    grid = found["comparisons"][0]["layers"][0]["right"]
    assert (len(grid), len(grid[0])) == (4, 8)
    assert run_command("inspect", trained.run, other, "--json", file).status == 0
    (tmp_path / "link.json").symlink_to(tmp_path / "nothing")
    for taken in (file, tmp_path / "link.json"):
        again = run_command("inspect", trained.run, "--json", taken)
        assert again.status == 2
        assert "exists already" in again.err


def test_figures_are_written_to_a_new_folder(loralib, tmp_path):
    ended = run_command("inspect", loralib, loralib, "--figures", tmp_path / "figures")
    assert ended.status == 0, ended.err
    assert len(list((tmp_path / "figures").glob("*.png"))) == 6
    figures = ("--figures", tmp_path / "figures")
    assert run_command("inspect", loralib, loralib, *figures).status == 0
    again = run_command("inspect", loralib, "--figures", tmp_path / "figures")
    assert again.status == 2
    assert "exists already" in again.err


def test_figures_without_matplotlib_are_refused_before_any_work(loralib, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = run_command("inspect", loralib, "--figures", tmp_path / "figures")
    assert ended.status == 2
    assert "pip install matplotlib" in ended.err
    assert ended.out == ""


def test_a_wrong_target_is_one_error_message(trained, other, tiny_base, tmp_path):
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04")
    mistakes = {
        "neither a run": [tiny_base],
        "cannot be read": [tmp_path / "cut.pt"],
        "has 4": [trained.run, other, "-i", 5],
        "give a second run": [trained.run, "-j", 2],
        "sees no CUDA": [trained.run, "--device", "cuda"],
    }
    if torch.cuda.is_available():
        del mistakes["sees no CUDA"]
    for message, arguments in mistakes.items():
        ended = run_command("inspect", *arguments)
        assert ended.status == 2, arguments
        assert message in ended.err
        assert ended.err.count("error:") == 1


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_a_terminal(trained, other, width):
    inspection = inspecting.inspect([trained.run, other])
    (comparison,) = inspection.comparisons
    rows = inspection.targets[1].layers
    tables = [
        layer_table(rows, is_scaled=True),
        amplification_table(rows),
        phi_table(comparison.layers, None, None),
    ]
    for table in tables:
        console = Console(width=width, file=io.StringIO())
        console.print(table)
        lines = console.file.getvalue().splitlines()
        names = [line.split()[0] for line in lines if "_proj" in line]
        assert names == [row.path.removeprefix("model.layers.") for row in rows]
        wide = Console(width=300, file=io.StringIO())
        wide.print(table)
        full, fitted = (cells(c.file.getvalue(), names[0]) for c in (wide, console))
        # only the list of singular values is wrapped, no number is cut
        assert fitted == full[: len(fitted)]
        assert len(fitted) >= 5


def test_open_gates_are_counted():
    row = LayerRow(
        path="h.0.fc",
        shape=(8, 8),
        rank=4,
        kept_rank=2,
        effective_rank=1.5,
        singular_values=(2.0, 1.0, 0.0, 0.0),
        norm=None,
        weight_norm=None,
        relative_norm=None,
        amplification=None,
        gates=(1.0, 0.0, -0.25, 0.0),
    )
    console = Console(width=120, file=io.StringIO())
    console.print(layer_table([row], is_scaled=False))
    assert cells(console.file.getvalue(), "fc") == ["4", "2", "1.50", "2/4", "2", "1", "0", "0"]


def test_a_target_and_at_least_one_direction_are_required(trained):
    assert run_command("inspect").status == 2
    assert run_command("inspect", trained.run, trained.run, "-i", 0).status == 2
