"""The report's page: the result at its top, sections with data alone, terms explained, long tables folded, narrow screens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, NO_CHROMIUM, Browser
from report_data import report_data

from vlmguard.apps.report.data import ReportData
from vlmguard.apps.report.figures import SETTING_WORDS, make_figures
from vlmguard.apps.report.glossary import TERMS
from vlmguard.apps.report.page import make_page
from vlmguard.exporter.prompts.formats import SETTINGS
from vlmguard.graphs.modes import MODES, guard_mode, modes_where

pytest.importorskip("plotly")

LONGEST_LEGEND = 25  # characters
PLAIN = ("text", "blank", "image")
VOID = {"meta", "link", "input", "br"}


class Outline(HTMLParser):
    """What is in each section: headings, texts, charts, tables, terms; and what is folded.

    Attributes:
        sections: id of the heading -> the section's text.
        charts: id of the heading -> names of its figures.
        terms: id of the heading, empty for the header -> terms that are explained there.
        folded: summaries of the `details` elements.
        tables: caption -> whether it is folded.
        lines: text of each element that contains no other, in the order of the page.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {"": ""}
        self.charts: dict[str, list[str]] = {}
        self.terms: dict[str, list[str]] = {}
        self.folded: list[str] = []
        self.tables: dict[str, bool] = {}
        self.open: list[tuple[str, dict[str, str]]] = []
        self.opened: list[dict[str, str]] = []
        self._section = ""
        self.feed(re.sub(r"<script[^>]*>.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "section":
            self._section = given["aria-labelledby"]
            self.sections[self._section] = ""
        if tag == "details":
            self.opened.append(given)
        if "data-figure" in given:
            self.charts.setdefault(self._section, []).append(given["data-figure"])
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1][0] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.sections[self._section] += data
        tags = [tag for tag, _ in self.open]
        inside = tags[-1] if tags else ""
        if inside == "summary":
            self.folded.append(data)
        if "caption" in tags and data.strip():
            self.tables[data] = "details" in tags
        if inside == "dt" and ("dl", {"class": "terms"}) in self.open:
            self.terms.setdefault(self._section, []).append(data.rstrip(":"))


def outline(data: ReportData) -> Outline:
    return Outline(make_page(data, "some day"))


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


# -------------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("mode", ["align", "restore"])
def test_the_result_is_at_the_top(mode: str) -> None:
    """The headline, then the gap closed with its interval for each setting with an image, before any link or table."""
    page = make_page(report_data(mode), "some day")
    top = page[page.index("<body>") : page.index("<nav")]
    text = text_of(top)
    parts = ["With an image, harmful requests answered: 100% → 0%.", "100.0% gap closed, blank image"]
    parts += [
        "95% interval: 54.1% to 100.0%",
        "of 6 harmful prompts 6 are refused as text only, 0 unguarded, 6 guarded",
    ]
    parts += ["100.0% gap closed, real image", "gap closed: Of the refusals", "text-only model: The unguarded model"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.count("95% interval: 54.1% to 100.0%") == 2  # the setting typographic has no text-only counterpart
    assert "<table" not in top and f"Mode {mode}, decoder layers 3, 4 of 6" in text and guard_mode(mode).summary in text


def test_without_a_gap_no_share_of_it_is_closed() -> None:
    data = report_data("align", PLAIN, text_refuses=False)
    page = make_page(data, "some day")
    top = text_of(page[page.index("<body>") : page.index("<nav")])
    assert top.count("no gap to close, ") == 2 and "gap closed, " not in top and "% to " not in top
    assert "no gap: The text-only model refuses no more" in top


def test_texts_alone_have_no_gap() -> None:
    page = make_page(report_data("restore", ("text",)), "some day")
    assert '<ul class="gaps">' not in page and "gap closed" not in page
    assert "In text, harmful requests answered: 0% → 0%." in text_of(page)


# ------------------------------------------------------------------------------------------------------------ its sections


@pytest.mark.parametrize("mode", MODES)
def test_sections_without_data_are_left_out(mode: str) -> None:
    found = outline(report_data(mode))
    expected = ["summary", "states", "separation", "gates", "refusals", "strength", "cost", "guard"]
    expected = [name for name in expected if name != "gates" or mode in modes_where(has_threshold=True)]
    expected = [name for name in expected if name != "strength" or mode in modes_where(has_alpha=True)]
    assert list(found.sections)[1:] == expected
    links = re.findall(r'<li><a href="#(\w+)">', make_page(report_data(mode), "some day"))
    assert links == expected
    for name in expected:
        assert name in found.charts or name in ("summary", "cost", "guard")
        assert not re.search(r"has no (gate|strength)|no benchmark|not shown:|\bnone given\b", found.sections[name])
    assert not found.open


def test_parts_without_data_are_left_out() -> None:
    data = report_data("restore")
    bare = replace(data, separations=(), cost=replace(data.cost, engines=(), latency=()), mistakes=(), anchors_auc={})
    found, whole = outline(bare), outline(data)
    assert "separation" not in found.sections and "separation" in whole.sections
    assert {"TensorRT engines", "Latency, of the model that was measured, which need not be this one"} <= {
        *whole.tables
    }
    assert not {caption for caption in found.tables if "engines" in caption or "Latency" in caption}
    few = [replace(row, d_prime=None) for row in data.separations]
    assert outline(replace(data, separations=tuple(few))).charts["separation"] == ["separation-auc"]


def test_columns_without_values_are_left_out() -> None:
    page = make_page(report_data("align"), "some day")
    heads = dict(_heads(page))
    assert heads["Guarded layers"] == ["layer", "sum", "rank"]
    heads = dict(_heads(make_page(report_data("restore"), "some day")))
    assert heads["Guarded layers"] == ["layer", "sum", "rank", "threshold", "target"]


def _heads(page: str) -> Iterator[tuple[str, list[str]]]:
    for caption, head in re.findall(r"<caption><span>(.*?)</span></caption>\n<thead><tr>(.*?)</tr>", page):
        yield caption, re.findall(r'<th scope="col">(.*?)</th>', head)


def test_the_plan_and_long_tables_are_folded() -> None:
    found = outline(report_data("supervise"))
    assert {"The plan", "The checks of the proof", "The calibration", "guard.json"} <= {*found.folded}
    open_tables = {caption for caption, folded in found.tables.items() if not folded}
    assert open_tables == {
        "Refusals compared with the text-only model",
        "KL divergence of the guarded model, on harmless prompts with an image",
        "Errors of both models, with 95% intervals",
        "What the guard adds to the decoder",
        "TensorRT engines",
        "Latency, of the model that was measured, which need not be this one",
    }
    assert len(found.opened) == len(found.folded) and not any("open" in given for given in found.opened)
    assert "Proof: 2 of 2 checks held" in found.sections["guard"]


# ---------------------------------------------------------------------------------------------------------------- its words


def test_terms_are_explained_where_they_appear() -> None:
    """Each in one short sentence or two, in the section that uses it."""
    explained: set[str] = set()
    for mode in MODES:
        found = outline(report_data(mode))
        where = {
            "": ["gap closed", "text-only model", "95% interval"],
            "summary": ["refused", "extra refusals", "missing refusals", "borderline", "KL divergence"],
            "states": ["hidden state", "principal components"],
            "separation": ["AUC", "d′", "score", "text direction", "SSD row 1", "anchors"],
            "gates": ["gate", "opened"],
            "refusals": ["attack success", "over-refusal"],
            "strength": ["alpha"],
            "cost": ["nodes", "kernels", "ratio"],
            "guard": ["sum", "rank", "worst", "limit"],
        }
        where["summary"] += [SETTING_WORDS[setting] for setting in SETTINGS] + ["harmful only in the picture"]
        for section, names in where.items():
            assert section not in found.sections or {*names} <= {*found.terms[section]}, (mode, section)
        explained |= {name for names in found.terms.values() for name in names}
    explained |= {*outline(report_data("align", PLAIN, text_refuses=False)).terms[""]}
    assert explained | {"readout"} >= {*TERMS}
    sentences = [*TERMS.values(), *(guard_mode(mode).summary for mode in MODES)]
    assert all(len(sentence) <= 180 and sentence.endswith(".") for sentence in sentences)


def test_legends_are_short_and_hover_texts_have_the_rest() -> None:
    drawn: list[tuple[str, Any]] = []
    for name, figures in make_figures(report_data("supervise")).items():
        drawn += [
            (name, trace)
            for figure in (figures if isinstance(figures, list) else [figures])
            for trace in figure["data"]
        ]
    assert max(len(trace["name"]) for _, trace in drawn) <= LONGEST_LEGEND
    assert all(trace["hovertemplate"].endswith("</extra>") for _, trace in drawn)
    hovers = [trace["hovertemplate"] for name, trace in drawn if name == "separation-auc"]
    assert "request in the image, guarded<br>layer %{x}: AUC %{y:.3f}<extra></extra>" in hovers
    assert any("row 1 of the safety steering direction" in hover for hover in hovers)


# ------------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_narrow_and_wide_screens(tmp_path: Path) -> None:
    """At 360 px only the boxes of tables scroll sideways, folded parts included, and legends stay inside their charts."""
    outside = """[...document.querySelectorAll('body *')].filter(element => !element.closest('.scroll, pre, svg, .skip')
        && element.getBoundingClientRect().right > innerWidth + 1).map(element => element.outerHTML.slice(0, 90))"""
    # an entry is cut where its text reaches the mark of the next one in its row, or the edge of the chart
    cut = """[...document.querySelectorAll('.chart')].filter(chart => {
        const box = element => element.getBoundingClientRect();
        const entries = [...chart.querySelectorAll('.legend .traces')];
        const parts = entries.map(entry => [box(entry.querySelector('.legendtext')), box(entry.querySelector('.layers'))]);
        return parts.some(([text]) => text.right > box(chart).right || parts.some(([, mark]) =>
            mark.left > text.left && mark.left < text.right && mark.top < text.bottom && mark.bottom > text.top));
    }).map(chart => chart.dataset.figure)"""
    with Browser() as browser:
        for mode, width in (("supervise", 360), ("align", 360), ("supervise", 768), ("supervise", 1280)):
            page = tmp_path / f"{mode}.html"
            page.write_text(make_page(report_data(mode, texts=12), "some day"), encoding="utf-8")
            browser.open(page.as_uri(), "[data-drawn]", width)
            assert browser.value("document.querySelectorAll('details').length") >= 5
            assert browser.value("document.querySelectorAll('details[open]').length") == 0
            assert browser.value("document.documentElement.scrollWidth") <= width
            headline = browser.value("document.querySelector('.headline').getBoundingClientRect().bottom")
            assert headline < 400 and browser.value("document.querySelector('.gaps').getBoundingClientRect().top") < 500
            browser.value("document.querySelectorAll('details').forEach(details => { details.open = true })")
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value(outside) == [], (mode, width)
            assert browser.value(cut) == [], (mode, width)
            assert browser.said == []
