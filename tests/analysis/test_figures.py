"""The written files, for inspections built by hand."""

from qlora_lite.analysis.figures import by_name, depth, draw
from qlora_lite.analysis.findings import Comparison, Inspection, LayerRow, PhiRow, TargetReport

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def row(path, **changed):
    """A row of a loralib checkpoint: no weight, no scale."""
    values = {
        "shape": (6, 8),
        "rank": 2,
        "kept_rank": 1,
        "effective_rank": 1.0,
        "singular_values": (1.0, 0.0),
        "norm": None,
        "weight_norm": None,
        "relative_norm": None,
        "amplification": None,
        "gates": None,
    }
    return LayerRow(path=path, **(values | changed))


def inspection(*grids):
    """Two targets with layers of two names; each grid is phi of one layer."""
    rows = tuple(row(f"h.{n}.{name}") for n in range(9) for name in ("c_attn[0]", "fc"))
    reports = tuple(TargetReport(f"{n}.pt", "loralib", None, False, (), rows) for n in range(2))
    phi = tuple(
        PhiRow(row.path, row.shape, "factors", grid, ())
        for row, grid in zip(rows, grids, strict=False)
    )
    return Inspection(reports, (Comparison(0, 1, phi),))


def test_layers_are_grouped_by_name():
    paths = ["a.0.q", "a.0.k", "a.1.q", "q"]
    assert by_name(paths) == {"q": ["a.0.q", "a.1.q", "q"], "k": ["a.0.k"]}


def test_unknown_values_have_no_figure(tmp_path):
    draw(inspection(((0.5, 0.25),), ((1.0,),)), tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    # the left grids are empty; [0] becomes _0_ in file names
    assert names == {
        "spectra-1.png",
        "spectra-2.png",
        "layers-1.png",
        "layers-2.png",
        "phi-1-2-right-c_attn_0_.png",
        "phi-1-2-right-fc.png",
    }
    assert all(file.read_bytes().startswith(SIGNATURE) for file in tmp_path.iterdir())


def test_without_phi_there_is_no_map(tmp_path):
    draw(inspection((), ()), tmp_path)
    assert not list(tmp_path.glob("phi*"))


def test_the_depth_of_a_layer_is_the_number_of_its_block():
    assert depth("model.layers.11.self_attn.q_proj", otherwise=3) == 11
    assert depth("transformer.h.0.attn.c_attn", otherwise=3) == 0
    assert depth("model.embed_tokens", otherwise=3) == 3
