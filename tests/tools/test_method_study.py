"""The study of all methods: stored measurements, verdicts, and the page."""

import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_lite.foundation.errors import RecipeError, RunError
from qlora_lite.methods.lora import LoRA
from tests.workbench import one_layer, perturb

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "budget",
    "claims",
    "comparable",
    "contenders",
    "cost",
    "figures",
    "material",
    "page",
    "processes",
    "ranks",
    "rates",
    "readings",
    "results",
    "schedule",
    "verdict",
)


@pytest.fixture(scope="module")
def study():
    """The tool and its stages; their folder is on `sys.path` when the script runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools" / "benchmark")
        stages = {name: importlib.import_module(f"method_study.{name}") for name in STAGES}
        yield SimpleNamespace(tool=importlib.import_module("methods"), **stages)


# ----------------------------------------------------------------------------------- the whole tool


@pytest.fixture
def quick(study, monkeypatch):
    """Few and short steps on few rows, one rate, no figures."""
    whole = study.schedule.recipe_of

    def recipe_of(*what):
        return whole(*what).but(
            "data.max_rows=40", "data.max_heldout_rows=4", "optim.tokens_per_step=256"
        )

    monkeypatch.setattr(study.schedule, "recipe_of", recipe_of)
    monkeypatch.setattr(study.cost, "PAIRS", 2)
    monkeypatch.setattr(study.rates, "FACTORS", (1.0,))
    monkeypatch.setattr(study.figures, "require_matplotlib", lambda: None)
    monkeypatch.setattr(study.figures, "draw", lambda readings, methods, folder: [])
    return study


def stop_after(monkeypatch, results, number):
    """Interrupt before measurement `number + 1` is stored."""
    record = results.Results.record

    def counted(self, *measured):
        if len(self.lines) == number:
            raise KeyboardInterrupt
        record(self, *measured)

    monkeypatch.setattr(results.Results, "record", counted)


@pytest.mark.slow
def test_two_methods_from_the_first_run_to_the_page(quick, tmp_path, monkeypatch, capsys):
    words = [str(tmp_path / "work"), "--only", "lora_plus", "--steps", "2", "--seeds", "1"]
    words += ["--cores", "1"]  # a fork of a process that has computed has one thread at most
    docs = tmp_path / "docs"
    lines = tmp_path / "work" / "results.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, quick.results, 3)
        with pytest.raises(KeyboardInterrupt):
            quick.tool.main(words)
    assert len(lines.read_text().splitlines()) == 3

    quick.tool.main([*words, "--write", str(docs)])
    said = capsys.readouterr().out
    assert "rates: 2, 2 done" in said
    assert "costs: 2, 1 done" in said
    first = lines.read_text()

    with monkeypatch.context() as patch:
        stop_after(patch, quick.results, 6)
        quick.tool.main([*words, "--write", str(docs)])
    assert "runs: 2, 2 done" in capsys.readouterr().out
    assert lines.read_text() == first

    page = (docs / "methods.md").read_text()
    assert page.count("\n| lora_plus | 0.001 ") == 1
    assert "| LoRA+ is better than LoRA at equal steps | embedded | lora_plus " in page
    found = json.loads((docs / "benchmarks" / "methods.json").read_text())
    assert found["core_seconds"] == sum(line["seconds"] for line in found["results"])
    assert found["findings"][0]["verdict"] == "no verdict"
    assert found["findings"][0]["reason"].startswith("rates 0.001 and 0.004, that of lora_plus")
    assert str(tmp_path) not in json.dumps(found)
    costs = [line["values"] for line in found["results"] if line["key"]["kind"] == "cost"]
    assert all(c["trained_at_a_time"] == 77_824 and len(c["ratios"]) == 2 for c in costs)
    assert all(c["rest_bytes"] > 77_824 * 4 * 3 and c["peak_bytes"] > 0 for c in costs)


def test_a_measurement_with_other_settings_is_refused(study, tmp_path):
    results = study.results.Results(tmp_path)
    key = study.results.Key("run", "lora", "embedded", 0)
    results.record(study.results.Task(key, {"steps": 40}, dict), {"loss": 1.0}, 20.0, threads=2)
    again = study.results.Results(tmp_path)
    assert again.has(study.results.Task(key, {"steps": 40}, dict))
    assert again.values(key) == {"loss": 1.0}
    assert again.core_seconds == 40.0
    with pytest.raises(RunError, match="steps: 40 -> 60"):
        again.has(study.results.Task(key, {"steps": 60}, dict))


def process_of(barrier):
    """Wait for the other measurement, which must run at the same time."""
    barrier.wait(timeout=60)
    return {"process": os.getpid(), "threads": torch.get_num_threads(), "run_seconds": 1000.0}


def fails(error):
    raise error


def test_measurements_run_in_parallel_subprocesses(study):
    barrier = multiprocessing.get_context("fork").Barrier(2)
    keys = [study.results.Key("run", "lora", "embedded", seed) for seed in range(2)]
    tasks = [study.results.Task(key, {}, partial(process_of, barrier)) for key in keys]
    found = list(study.processes.run_in_parallel(tasks, jobs=2, threads=1))
    assert sorted(task.key.seed for task, _, _ in found) == [0, 1]
    assert len({values["process"] for _, values, _ in found} | {os.getpid()}) == 3
    assert all(values["threads"] == 1 for _, values, _ in found)
    assert all(seconds == 1000.0 for *_, seconds in found)  # earlier attempts count


@pytest.mark.parametrize(
    ("error", "said"), [(RunError("no"), "no"), (SystemExit(3), "'run: lora .* without a result")]
)
def test_a_measurement_that_fails_ends_the_study(study, error, said):
    task = study.results.Task(
        study.results.Key("run", "lora", "embedded"), {}, partial(fails, error)
    )
    with pytest.raises((RunError, RuntimeError), match=said):
        list(study.processes.run_in_parallel([task], jobs=2, threads=1))


# -------------------------------------------------------------------------------------- the methods


def test_every_method_of_the_catalogue_takes_part_at_the_budget(study):
    chosen = study.contenders.contenders([])
    assert [contender.kind for contender in chosen] == study.contenders.kinds()
    for contender in (*chosen, *study.contenders.extras(chosen)):
        recipe = study.budget.recipe_of(contender, study.material.EMBEDDED, 40, 0, 1e-3, ROOT)
        assert study.budget.settings_of(recipe)["lr"] == 1e-3
        settings = study.budget.settings_of(recipe)["adapter"]
        assert settings["kind"] == contender.kind
        assert settings.get("dropout", 0.0) == 0.0
    assert set(study.contenders.SETTINGS) <= set(study.contenders.kinds())


def test_only_the_given_methods_and_lora_are_trained(study):
    chosen = study.contenders.contenders(["melora"])
    assert [contender.name for contender in chosen] == ["lora", "melora"]
    assert [extra.name for extra in study.contenders.extras(chosen)] == ["lora-rank-4"]
    with pytest.raises(RecipeError, match=r"--only lorra: no such method. There are lora, "):
        study.contenders.contenders(["lorra"])


def test_a_truncated_lora_keeps_its_first_components(study):
    layer = perturb(one_layer(LoRA(rank=4, alpha=8), d_out=6, d_in=5))
    down, up = study.ranks.truncated(layer, 2)
    torch.testing.assert_close(up @ down, 2.0 * layer.b[:, :2] @ layer.a[:2])


# ------------------------------------------------------------------------------------- the verdicts


@pytest.mark.parametrize(
    ("values", "above", "not_below"),
    [
        ([0.3, 0.2, 0.4], "confirmed", "confirmed"),
        ([0.1, -0.2, 0.4], "undecided", "undecided"),
        ([-0.001, 0.001, 0.0], "undecided", "confirmed"),
        ([-0.3, -0.2, -0.4], "not confirmed at this size", "not confirmed at this size"),
        ([0.3], "one seed has no spread", "one seed has no spread"),
        ([0.0, 0.0], "not confirmed at this size", "confirmed"),
    ],
)
def test_a_difference_is_significant_if_it_exceeds_its_error(study, values, above, not_below):
    assert study.verdict.is_above(values) == above
    assert study.verdict.is_not_below(values) == not_below


def test_a_mean_is_printed_with_its_spread(study):
    assert study.verdict.mean_and_spread([3.0, 3.1, 3.2]) == "3.100 ± 0.100"
    assert study.verdict.mean_and_spread([3.0]) == "3.000"
    assert study.verdict.mean_and_spread([0.5, 0.5], sign="+") == "+0.500 ± 0.000"


def readings_of(study, folder, measured, lrs=None):
    """Readings of two seeds: `{(kind, method, data): (values, values)}`.

    All runs have the rate 0.004, except those of `lrs`, by method.
    """
    results = study.results.Results(folder)
    for (kind, method, data), seeds in measured.items():
        adapter = study.comparable.current_settings().get(method)
        settings = {"lr": (lrs or {}).get(method, 0.004), "adapter": adapter}
        for seed, values in enumerate(seeds):
            key = study.results.Key(kind, method, data, seed)
            line = {"key": asdict(key), "settings": settings, "seconds": 1.0, "values": values}
            results.lines[key] = line
    return study.readings.Readings(results, len(seeds))


def run(loss, **more):
    return {"loss": loss, "losses": [4.0, loss], "trained": 100, "components": 8, **more}


def test_claims_report_both_methods_and_are_left_out_if_runs_are_missing(study, tmp_path):
    readings = readings_of(
        study,
        tmp_path,
        {
            ("run", "lora", "e2e"): (run(3.0), run(3.2)),
            ("run", "cola", "e2e"): (run(2.9), run(3.0)),
            ("run", "melora", "e2e"): (run(3.1, trained=50), run(3.3, trained=50)),
            ("run", "adalora", "e2e"): (run(3.0), {"failed": "the loss is nan"}),
        },
    )
    found = study.claims.findings(readings, ["e2e", "gsm8k"])
    assert [(f.claim, f.data, f.verdict) for f in found] == [
        ("MELoRA is as good as LoRA with fewer parameters", "e2e", "not confirmed at this size"),
        ("COLA is better than LoRA at equal steps", "e2e", "undecided"),
    ]
    assert found[0].measured.endswith("difference +0.100 ± 0.000; trained parameters 50 and 100")
    assert found[1].measured == "cola 2.950 ± 0.071, lora 3.100 ± 0.141; difference -0.150 ± 0.071"
    assert study.page.table(readings, ["lora", "adalora"], ["e2e"]).endswith(
        "| lora | – | – | – | 3.100 ± 0.141 | – | – |\n| adalora | – | – | – | stopped | – | – |"
    )
    assert "adalora on e2e: the loss is nan" in study.page.stopped(readings, ["adalora"], ["e2e"])


def test_the_lowest_and_highest_rates_are_marked(study, tmp_path):
    readings = readings_of(study, tmp_path, {("run", "lora", "embedded"): (run(3.0),)})
    for kind, losses in {"lora": (3.2, 3.1, 3.3), "adalora": (3.2, 3.1, 3.0)}.items():
        for lr, loss in zip(study.rates.rates_of(kind), losses, strict=True):
            key = study.rates.rate_key(kind, lr)
            readings.results.lines[key] = {"seconds": 1.0, "values": run(loss)}
    cost = {"rest_bytes": 2**20, "peak_bytes": 2**20, "trained_at_a_time": 25, "ratios": [1, 3, 2]}
    for kind in ("lora", "adalora"):
        more = run(3.0, exported="native.safetensors", exported_bytes=2048)
        for name, values in (("run", more), ("cost", cost)):
            key = study.results.Key(name, kind, "embedded", 0)
            readings.results.lines[key] = {"seconds": 1.0, "values": values}
    assert study.page.table(readings, ["lora", "adalora"], ["embedded"]).splitlines()[2:] == [
        "| lora | 0.004 | 100 (25 at a time) | 2.00 KiB (native) | 3.000 | 2.00 | 2.00 MiB |",
        "| adalora | 0.064 (highest) | 100 (25 at a time) | 2.00 KiB (native) | 3.000 | 2.00 "
        "| 2.00 MiB |",
    ]


def dylora_readings(study, folder):
    names = [study.contenders.at_rank(rank) for rank in range(1, 9)]
    measured = {("run", name, "embedded"): (run(3.0, step_seconds=1.0),) * 2 for name in names}
    measured["run", "dylora", "embedded"] = (run(3.0, step_seconds=1.6),) * 2
    falling = [3.8, 3.7, 3.6, 3.5, 3.4, 3.3, 3.2, 3.1]
    measured["ranks", "lora", "embedded"] = ({"losses": falling},) * 2
    measured["ranks", "dylora", "embedded"] = ({"losses": [2.9] * 8}, {"losses": [3.0] * 8})
    return readings_of(study, folder, measured)


def test_dylora_is_compared_with_separate_and_truncated_runs(study, tmp_path):
    readings = dylora_readings(study, tmp_path)
    time, truncated, quality = study.claims.findings(readings, ["embedded"])
    assert (time.verdict, time.measured[:9]) == ("confirmed", "5.0 ± 0.0")
    assert (truncated.verdict, quality.verdict) == ("confirmed", "undecided")
    assert "dylora 2.950 ± 0.071, truncated lora 3.500 ± 0.000" in truncated.measured
    assert "dylora 2.950 ± 0.071, separate runs 3.000 ± 0.000" in quality.measured


def adalora_readings(study, folder, data, lr):
    """AdaLoRA is better than LoRA in both seeds, at the rate `lr`."""
    measured = {
        ("run", "lora", data): (run(3.0), run(3.1)),
        ("run", "adalora", data): (run(2.8), run(2.9)),
    }
    return readings_of(study, folder, measured, {"adalora": lr})


def try_rates(study, readings, kind, losses):
    for lr, loss in zip(study.rates.rates_of(kind), losses, strict=True):
        key = study.rates.rate_key(kind, lr)
        readings.results.lines[key] = {"seconds": 1.0, "values": run(loss)}


def only_finding(study, readings, data):
    (finding,) = study.claims.findings(readings, [data])
    return finding.verdict, finding.reason


def test_different_rates_have_no_verdict_on_data_where_none_were_tried(study, tmp_path):
    for data in ("e2e", "gsm8k"):
        readings = adalora_readings(study, tmp_path, data, 0.016)
        try_rates(study, readings, "adalora", (3.0, 2.8, 2.9))
        try_rates(study, readings, "lora", (3.2, 3.0, 3.1))
        assert only_finding(study, readings, data) == ("no verdict", "rates 0.016 and 0.004")
        readings = adalora_readings(study, tmp_path, data, 0.004)
        assert only_finding(study, readings, data) == ("confirmed", "")


@pytest.mark.parametrize(
    ("lr", "adalora", "lora", "not_bracketed"),
    [
        (0.016, (3.0, 2.8, 2.9), (3.2, 3.0, 3.1), None),
        (0.064, (3.0, 2.9, 2.8), (3.2, 3.0, 3.1), "adalora"),
        (0.016, (3.0, 2.8, 2.9), (3.0, 3.1, 3.2), "lora"),
        (0.016, (3.0, 2.9, 2.8), (3.2, 3.0, 3.1), "adalora"),  # not its best
    ],
)
def test_different_rates_have_a_verdict_if_each_is_the_best_and_inside_of_those_tried(
    study, tmp_path, lr, adalora, lora, not_bracketed
):
    readings = adalora_readings(study, tmp_path, "embedded", lr)
    try_rates(study, readings, "adalora", adalora)
    try_rates(study, readings, "lora", lora)
    verdict, reason = only_finding(study, readings, "embedded")
    assert verdict == ("no verdict" if not_bracketed else "confirmed")
    wanted = f"rates {lr:g} and 0.004, that of {not_bracketed} is not bracketed"
    assert reason == (wanted if not_bracketed else "")


def test_runs_with_former_settings_have_no_verdict(study, tmp_path):
    readings = adalora_readings(study, tmp_path, "e2e", 0.004)
    key = study.results.Key("run", "adalora", "e2e", 0)
    line = readings.results.lines[key]
    former = line["settings"]["adapter"] | {"rank": 11}
    line["settings"] = line["settings"] | {"adapter": former}
    reason = "adalora was measured with other settings"
    assert only_finding(study, readings, "e2e") == ("no verdict", reason)
    assert study.comparable.outdated(readings, ["lora", "adalora", "sora"], "e2e") == ["adalora"]
    assert study.page.other_settings(["adalora"]).endswith("have now: adalora.")


def test_the_start_of_loftq_is_measured_without_a_verdict(study, tmp_path):
    readings = readings_of(
        study,
        tmp_path,
        {
            ("run", "unquantised", "e2e"): ({"start": 5.0}, {"start": 5.1}),
            ("run", "lora", "e2e"): (run(3.0, start=5.2), run(3.0, start=5.3)),
            ("run", "loftq", "e2e"): (run(3.1, start=4.9), run(3.1, start=5.1)),
        },
    )
    final, start = study.claims.findings(readings, ["e2e"])
    assert (final.verdict, start.verdict) == ("not confirmed at this size", "no verdict")
    assert start.reason == "a gap between losses is no distance between models"
    assert "loftq 0.0500 ± 0.0707, 4-bit base 0.2000 ± 0.0000" in start.measured


# ----------------------------------------------------------------------------------------- the page


def test_the_page_changes_only_between_its_markers(study, tmp_path):
    page = tmp_path / "docs" / "methods.md"
    study.page.update(page, "one")
    assert page.read_text() == "<!-- study:begin -->\none\n<!-- study:end -->\n"
    page.write_text(f"# Methods\n\n{page.read_text()}\nAfter.\n")
    study.page.update(page, "two")
    assert page.read_text() == (
        "# Methods\n\n<!-- study:begin -->\ntwo\n<!-- study:end -->\n\nAfter.\n"
    )
    page.write_text("# Methods\n")
    study.page.update(page, "three")
    assert page.read_text() == "# Methods\n\n<!-- study:begin -->\nthree\n<!-- study:end -->\n"


def test_the_page_is_what_the_tool_writes_from_its_measurements(study, tmp_path):
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs)
    study.tool.main(["--rewrite", str(docs)])
    for name in ("methods.md", "benchmarks/methods.json"):
        assert (docs / name).read_bytes() == (ROOT / "docs" / name).read_bytes()


def test_every_verdict_on_the_page_is_of_comparable_runs():
    """Recomputed from the stored rates alone: those of the runs, and those that were tried."""
    stored = json.loads((ROOT / "docs" / "benchmarks" / "methods.json").read_text())
    settings = stored["settings"]
    lrs = {
        (line["key"]["method"], line["key"]["data"]): line["settings"]["lr"]
        for line in stored["results"]
        if line["key"]["kind"] == "run" and line["key"]["method"] != "unquantised"
    }
    compared = 0
    for finding in stored["findings"]:
        pair = re.match(r"(\S+) [\d.]+ ± [\d.]+, (\S+) [\d.]+ ± ", finding["measured"])
        if pair is None or finding["verdict"] == "no verdict":
            continue
        compared += 1
        one, other = (lrs[name, finding["data"]] for name in pair.groups())
        if one != other:
            assert finding["data"] == "embedded"
            for name in pair.groups():
                tried = settings["rates_tried"][name]
                assert min(tried) < settings["rates"][name] < max(tried)
    assert compared > 20


def test_a_folder_or_the_docs_must_be_given(study, capsys):
    with pytest.raises(SystemExit):
        study.tool.main([])
    assert "WORK" in capsys.readouterr().err


def test_figures_are_drawn_if_their_runs_exist(study, tmp_path):
    pytest.importorskip("matplotlib")
    readings = dylora_readings(study, tmp_path)
    files = study.figures.draw(readings, ["lora", "dylora"], tmp_path / "docs" / "methods")
    assert [file.name for file in files] == ["parameters.png", "dylora.png"]
    assert all(file.stat().st_size > 5000 for file in files)
    shown = study.page.pictures(files, tmp_path / "docs" / "methods.md")
    assert shown.startswith("![parameters](methods/parameters.png)")


def test_figures_without_matplotlib_are_refused_before_anything_is_trained(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match="figures"):
        study.figures.require_matplotlib()
