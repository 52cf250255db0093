"""The page of a run: self-contained, safe with any text, small, and readable by `merge`."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qlora_lite.foundation.errors import RunError
from qlora_lite.report.contents import MergeRow, Report, Sample
from qlora_lite.report.page import read, render, write
from tests.report.reports import EMPTY, REPORT, long_run, scoring, training

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The tags and the text of a page; checks that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; ]]> \x00\x1b[31m \ud800 \"'\u2028"


def test_a_page_reads_back_as_the_report_it_was_written_from(tmp_path: Path):
    write(tmp_path / "report.html", REPORT)
    assert read(tmp_path / "report.html") == REPORT


def test_merge_adds_its_table_to_an_existing_page(tmp_path: Path):
    path = tmp_path / "report.html"
    write(path, replace(REPORT, metrics=long_run(3000, 100), merges=()))
    before = path.read_text()
    write(path, replace(read(path), merges=REPORT.merges))
    assert "merged on trained base" not in Page(before).text
    assert "merged on trained base" in Page(path.read_text()).text
    write(path, replace(read(path), merges=()))
    assert path.read_text() == before


def test_the_page_loads_nothing_and_runs_nothing():
    page = Page(render(REPORT))
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {
        name for name, _ in page.tags
    }
    assert not {"src", "href", "srcset", "action", "xlink:href"} & {
        key for _, attributes in page.tags for key in attributes
    }
    assert [script["type"] for script in page.all("script")] == ["application/json"]
    assert "http" not in render(REPORT).replace("http-equiv", "")
    assert "url(" not in render(REPORT)
    assert "@import" not in render(REPORT)


def test_the_page_forbids_every_request():
    policies = [m["content"] for m in Page(render(REPORT)).all("meta") if "http-equiv" in m]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_shows_the_numbers():
    text = Page(render(REPORT)).text
    for expected in (
        "2.062",  # the held-out loss
        "3.413 at step 0",
        "1.90 GiB",  # the measured peak
        "2.00 GiB predicted",
        "-5.0%",  # 1945 of 2048 MiB
        "+0.0%",
        "2.0626",
        "99.84%",
        "0.4375",
        "Qwen/Qwen3-0.6B",
        "quant.kind",
        "0.0002",
        "[0.9, 0.999]",
        "2.13.0",
        "two two two",
        "four",
    ):
        assert expected in text


def test_the_page_is_accessible_to_screen_readers():
    page = Page(render(REPORT))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1
    assert len(page.all("h2")) == len(page.all("section")) == 6
    assert len(page.all("caption")) == len(page.all("table")) == 8
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert all("scope" in head for head in page.all("th"))
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert "held-out: 3.413 at step 0, 2.062 at step 2" in labels[0]


def test_the_page_follows_a_light_or_dark_theme():
    assert "@media (prefers-color-scheme: dark)" in render(REPORT)


def test_any_text_is_escaped(tmp_path: Path):
    report = Report(
        title=HOSTILE,
        recipe={HOSTILE: {HOSTILE: HOSTILE}},
        metrics=REPORT.metrics,
        facts={HOSTILE: HOSTILE},
        memory=((HOSTILE, 1, None),),
        samples=(Sample(HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
        merges=(MergeRow(HOSTILE, 1.0, None, True),),
    )
    write(tmp_path / "report.html", report)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("script")) == 1
    shown = "</script><script>alert(1)</script><!-- <b>&amp; ]]> ␀␛[31m ? \"'\u2028"
    # title 2, setting 3, fact 2, memory 1, sample 4, merge 1
    assert page.text.count(shown) == 13
    assert read(tmp_path / "report.html") == report


def test_the_embedded_data_is_plain_json():
    page = render(REPORT)
    data = page.split('<script type="application/json" id="report">')[1].split("</script>")[0]
    assert json.loads(data)["recipe"] == REPORT.recipe


def test_an_empty_run_has_a_page():
    page = Page(render(EMPTY))
    assert "No step was logged." in page.text
    assert page.all("table") == []


def test_a_run_of_one_step_has_a_page():
    text = Page(render(replace(REPORT, metrics=(training(1, 3.25),)))).text
    assert "1 step" in text
    assert "step 1: 3.25" in text


def test_numbers_that_are_not_finite_are_accepted():
    broken = {"loss": math.nan, "grad_norm": math.inf, "lr": None}
    metrics = (training(1, 3.0), training(2, 2.5) | broken, scoring(2, math.nan))
    report = replace(REPORT, metrics=metrics, merges=(MergeRow("merged", math.inf, 0.1, False),))
    Page(render(report))


@pytest.mark.parametrize("scored_every", [1, 1000])
def test_the_page_of_a_long_run_stays_small(scored_every: int):
    page = render(replace(REPORT, metrics=long_run(10_000, scored_every)))
    assert len(page.encode()) < 300_000
    assert "10,000 steps" in Page(page).text


@pytest.mark.parametrize("content", [None, "<html></html>"])
def test_a_page_without_report_data_is_refused(tmp_path: Path, content: str | None):
    path = tmp_path / "report.html"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match=r"report\.html holds no report data"):
        read(path)
