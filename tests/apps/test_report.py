"""The report: its numbers against numpy's, its page against hostile names, and both sides of the tiny VLM in a browser."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, NO_CHROMIUM, Browser
from hand_graphs import uncalibrated
from text_decoder import IDS, decoder
from tiny_vlm_paths import ANCHORS, CALIBRATION, DECODER, EVALUATION, PROMPTS, SOURCE, Guarded

from vlmguard.apps.report import build_report
from vlmguard.apps.report.build_report import report
from vlmguard.apps.report.cost import EngineCost, cost_of
from vlmguard.apps.report.data import ReportData
from vlmguard.apps.report.gates import GateScores, bins
from vlmguard.apps.report.outcomes import mistakes_of, rates_of
from vlmguard.apps.report.plane import fit_plane
from vlmguard.apps.report.questions import in_settings
from vlmguard.apps.report.score_separation import auc, d_prime, separations
from vlmguard.apps.report.states import States, read_states
from vlmguard.apps.report.subject import Subject, open_subject
from vlmguard.exporter.evaluation.metrics import Evaluation
from vlmguard.exporter.evaluation.records import Record, Reply
from vlmguard.exporter.pipeline import export
from vlmguard.exporter.prompts.labelled import LabelledPrompt, read_prompts
from vlmguard.graphs import reference
from vlmguard.graphs.directions import Directions, LayerDirections, directions_bytes
from vlmguard.graphs.errors import ExtraMissing, GuardError, OutputRefused, PromptsUnusable
from vlmguard.graphs.extras import install_command
from vlmguard.graphs.graph_io import save_graph
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.taps import STATES_OUTPUT
from vlmguard.runtime.decoder_inputs import PromptBatch
from vlmguard.runtime.generation import Sampling

pytest_plugins = ("tiny_vlm_fixtures",)
pytestmark = pytest.mark.usefixtures("bundled_pictures")
pytest.importorskip("onnxruntime")
pytest.importorskip("plotly")

HOSTILE = "how to steal the </script><script>document.title='owned'</script><img src=x onerror=alert(1)> boat"
FEW = 4  # of each setting and label


def prompts_of(*kinds: tuple[str, str], texts: int = 4) -> list[LabelledPrompt]:
    """Some of each `(setting, label)`, the same texts in every setting."""
    return [
        LabelledPrompt(f"{setting}-{label}-{n}", f"{label} {n}", label, setting)  # type: ignore[arg-type]
        for setting, label in kinds
        for n in range(texts)
    ]


BOTH = (("text", "harmful"), ("text", "harmless"))

# ------------------------------------------------------------------------------------------------------------- the numbers


def test_the_plane_is_what_the_covariance_has() -> None:
    random = np.random.default_rng(0)
    harmful = np.arange(40) < 20
    states = random.normal(size=(40, 7)) * [9, 4, 1, 1, 1, 1, 1] + harmful[:, None] * [-3, 2, 0, 0, 0, 0, 0]
    plane = fit_plane(states, harmful)
    values, vectors = np.linalg.eigh(np.cov(states.T))
    for axis, share, value, vector in zip(plane.axes, plane.explained, values[::-1], vectors.T[::-1], strict=False):
        assert abs(axis @ vector) == pytest.approx(1)
        assert share == pytest.approx(value / values.sum())
    placed = plane.place(states)
    assert np.all(placed[harmful].mean(axis=0) > placed[~harmful].mean(axis=0))  # turned, whatever sign the SVD gave
    np.testing.assert_allclose(placed, (states - states.mean(axis=0)) @ plane.axes.T)
    np.testing.assert_allclose(
        fit_plane(-states, ~harmful).place(-states),
        -fit_plane(states, ~harmful).place(states)
        * [
            np.sign(a @ b)
            for a, b in zip(fit_plane(states, ~harmful).axes, fit_plane(-states, ~harmful).axes, strict=True)
        ],
    )


def test_a_layer_without_variance_has_a_plane_too() -> None:
    plane = fit_plane(np.ones((4, 3)), np.array([True, True, False, False]))
    assert plane.explained == (0.0, 0.0)
    np.testing.assert_array_equal(plane.place(np.ones((4, 3))), np.zeros((4, 2)))


def test_auc_counts_pairs_and_halves_ties() -> None:
    scores = np.array([0.0, 1, 1, 2, 3, 1])
    harmful = np.array([False, False, True, True, True, False])
    pairs = [(a > b) + (a == b) / 2 for a in scores[harmful] for b in scores[~harmful]]
    assert auc(scores, harmful) == pytest.approx(np.mean(pairs))
    above, below = scores[harmful], scores[~harmful]
    expected = (above.mean() - below.mean()) / np.sqrt((above.var(ddof=1) + below.var(ddof=1)) / 2)
    assert d_prime(scores, harmful) == pytest.approx(expected)
    assert d_prime(np.array([1.0, 1, 0, 0]), np.array([True, True, False, False])) is None


def test_the_text_direction_is_judged_on_prompts_that_did_not_make_it() -> None:
    """In 400 dimensions 40 prompts of pure noise part perfectly along the direction that they make themselves."""
    prompts = prompts_of(*BOTH, texts=20)
    noise = np.random.default_rng(0).normal(size=(40, 1, 400)).astype(np.float32)
    (own,) = (r for r in _separations(noise, prompts) if r.side == "unguarded")
    assert 0.2 < own.auc < 0.8
    parted = noise + np.array([[[8.0] if p.label == "harmful" else [0.0]] for p in prompts], np.float32)
    (own,) = (r for r in _separations(parted, prompts) if r.side == "unguarded")
    assert own.auc == 1.0 and own.d_prime is not None and own.d_prime > 2


def test_separation_along_the_folders_own_directions() -> None:
    prompts = prompts_of(*BOTH, ("blank", "harmful"), ("blank", "harmless"))
    states = np.random.default_rng(1).normal(size=(16, 2, 3)).astype(np.float32)
    known = LayerDirections(np.eye(3, dtype=np.float32)[:1], readout=np.eye(3, dtype=np.float32)[2])
    found = separations(States(states, states * 2, None, None), prompts, Directions(3, {5: known}), (4, 5))
    assert {(r.layer, r.along) for r in found} == {
        (4, "text direction"), (5, "text direction"), (5, "SSD row 1"), (5, "readout")
    }  # fmt: skip
    row = next(r for r in found if (r.layer, r.along, r.setting, r.side) == (5, "readout", "blank", "guarded"))
    labels = np.array([p.label == "harmful" for p in prompts])[8:]
    assert row.auc == pytest.approx(auc(states[8:, 1, 2], labels))


def _separations(states: np.ndarray, prompts: list[LabelledPrompt]) -> list[Any]:
    unknown = Directions(states.shape[-1], {9: LayerDirections(np.eye(1, states.shape[-1], dtype=np.float32))})
    return separations(States(states, states, None, None), prompts, unknown, (0,))


def said(answer: str, no: bool = False) -> Reply:
    return Reply(refused=no, tokens=1, digest=answer, answer=answer)


def test_rates_are_errors_and_mistakes_are_named_without_answers() -> None:
    prompts = tuple(prompts_of(*BOTH, texts=2))
    refusals = (True, False, True, False)  # of the guarded model; the unguarded one refuses nothing
    records = tuple(
        Record(
            number=n,
            id=p.id,
            setting=p.setting,
            label=p.label,
            intent=p.intent,
            base=said("yes"),
            guarded=said("no" if no else "yes", no),
        )
        for n, (p, no) in enumerate(zip(prompts, refusals, strict=True))
    )
    evaluation = Evaluation(prompts, records)
    counted = {(r.label, r.side): (r.erred, r.asked) for r in rates_of(evaluation)}
    assert counted == {
        ("harmful", "unguarded"): (2, 2), ("harmful", "guarded"): (1, 2),
        ("harmless", "unguarded"): (0, 2), ("harmless", "guarded"): (1, 2),
    }  # fmt: skip
    assert [(m.id, m.unguarded_too) for m in mistakes_of(evaluation)] == [
        ("text-harmful-1", True),
        ("text-harmless-0", False),
    ]
    assert all("yes" not in m.to_json().values() for m in mistakes_of(evaluation))


def test_borderline_prompts_are_asked_and_counted_and_have_no_states(
    guarded: Guarded, some: Path, tmp_path: Path
) -> None:
    """They are neither kind, so that no direction or plane is judged by them; their extra refusals are."""
    path = tmp_path / "p.jsonl"
    rows = [json.loads(line) for line in some.read_text(encoding="utf-8").splitlines()]
    odd = [dict(row, id=f"odd-{n}", label="borderline") for n, row in enumerate(rows) if row["label"] == "harmless"][:3]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*odd, *rows]), encoding="utf-8")
    page = tmp_path / "r.html"
    data = report(guarded("restore"), page, prompts=path, max_prompts=FEW, max_new_tokens=16)
    assert ("text", "borderline", 3) in data.counts() and len(data.prompts) == 6 * FEW + 3
    assert len(data.points[0].before) == len(data.drawn) == 6 * FEW
    figures = json.loads(Elements(page.read_text(encoding="utf-8")).scripts[0])
    assert sum(len(trace["x"]) for trace in figures["states-before"][0]["data"]) == 6 * FEW
    assert data.yardstick.settings[0].beyond[-1].label == "borderline"


def test_bins_hold_every_score_and_the_threshold() -> None:
    gates = [GateScores(3, "text", 5.0, (1.0, 2.0), (-1.0,)), GateScores(3, "blank", 5.0, (), (0.5,))]
    edges = bins(gates)
    assert edges[0] < -1 and edges[-1] > 5
    assert gates[0].opened("harmful") == 0
    assert replace(gates[0], threshold=1.0).opened("harmful") == 1  # strict
    assert len(set(np.diff(bins([GateScores(3, "text", 2.0, (2.0,), (2.0,))])).round(9))) == 1


def test_settings_are_added_where_the_file_has_none(tmp_path: Path) -> None:
    texts = prompts_of(*BOTH, texts=2)
    assert in_settings(texts, False, None) == texts
    assert [p.setting for p in in_settings(texts, True, None)] == ["text"] * 4 + ["blank"] * 4
    own = [*texts, replace(texts[0], setting="blank"), replace(texts[0], setting="image", image=tmp_path / "own.png")]
    assert in_settings(own, True, None) == own
    shown = in_settings(own, True, tmp_path / "given.png")
    assert {p.image for p in shown if p.setting == "image"} == {tmp_path / "given.png"}
    assert len([p for p in shown if p.setting == "image"]) == 4
    assert in_settings(own, False, None) == texts


# ----------------------------------------------------------------------------------------------------- the tiny VLM's states


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few held-out prompts of each kind; one of them hostile, and so is its id."""
    rows = [json.loads(line) for line in EVALUATION.read_text(encoding="utf-8").splitlines()]
    kept: list[dict[str, Any]] = []
    for setting in ("text", "blank", "image"):
        for label in ("harmful", "harmless"):
            kept += [row for row in rows if (row["setting"], row["label"]) == (setting, label)][3 : 3 + FEW]
    kept = [row | ({"image": str(PROMPTS / row["image"])} if row["image"] else {}) for row in kept]
    kept[0] = kept[0] | {"id": "<b>id</b>", "prompt": HOSTILE}
    path = tmp_path_factory.mktemp("prompts") / "some <i>held-out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def subjects(guarded: Guarded) -> Callable[[str], Subject]:
    opened: dict[str, Subject] = {}

    def get(mode: str) -> Subject:
        if mode not in opened:
            opened[mode] = open_subject(guarded(mode))
        return opened[mode]

    return get


@pytest.mark.parametrize("mode", ["restore", "supervise"])
def test_states_of_both_sides(subjects: Callable[[str], Subject], some: Path, mode: str) -> None:
    """Unguarded they are the source's; behind a guard they are what the numpy reference makes of what it reads."""
    subject, prompts = subjects(mode), read_prompts(some)
    told: list[tuple[int, int]] = []
    states = read_states(subject, prompts, 5, lambda *step: told.append(step))
    against = read_states(open_subject(subject.folder, SOURCE), prompts, 5)
    np.testing.assert_array_equal(states.before, against.before)
    assert told[-1] == (len(prompts) * 2, len(prompts) * 2)
    raw, opened = states.raw, 0
    assert raw is not None
    for row, (layer, guard) in enumerate(zip(subject.plan.layers, subject.plan.guards, strict=True)):
        told_by = None if states.supervisor is None else states.supervisor[:, None, row]
        expected = reference.guard(mode, guard, raw[:, None, row], told_by)[:, 0]
        np.testing.assert_allclose(states.after[:, layer], expected, rtol=1e-4, atol=1e-4)
        opened += int((np.abs(states.after[:, layer] - raw[:, row]).max(axis=1) > 1e-3).sum())
    assert opened >= FEW  # the guard did something, or the comparison says nothing
    first = subject.plan.layers[0]
    np.testing.assert_allclose(raw[:, 0], states.before[:, first], rtol=1e-5, atol=1e-5)  # nothing is guarded before
    np.testing.assert_allclose(states.after[:, :first], states.before[:, :first], rtol=1e-5, atol=1e-5)


def test_another_strength_is_another_guard(subjects: Callable[[str], Subject], some: Path) -> None:
    """The shipped strength answers as shipped; strength 0 never refuses what only the supervisor's edit refused."""
    subject = subjects("supervise")
    asked = [prompt.request(subject.guarded) for prompt in read_prompts(some) if prompt.setting == "blank"]
    (shipped,) = {guard.alpha for guard in subject.plan.guards}
    answers = {alpha: subject.with_alpha(alpha).answer(asked, Sampling(16)) for alpha in (shipped, 0.0)}
    assert answers[shipped] == subject.guarded.answer(asked, Sampling(16)) != answers[0.0]


def test_cost_is_counted(subjects: Callable[[str], Subject]) -> None:
    subject = subjects("restore")
    cost = cost_of(subject)
    record = subject.manifest.decoders[0].report
    assert cost.nodes == subject.anatomy.nodes and cost.nodes_added == record["nodes"] > 0
    size = (SOURCE / DECODER).stat().st_size
    assert 0.9 * size < cost.weights < size
    width, rank = subject.plan.width, subject.plan.guards[0].rank
    read_and_written = 4 * width * (2 * rank + 1) * len(subject.plan.layers)
    assert read_and_written <= cost.weights_added < read_and_written + 1000


def test_a_guard_in_the_weights_needs_the_source(tmp_path: Path) -> None:
    """Nothing can be taken out of folded weights; with the source both sides are there, and no state has a coordinate left."""
    (tmp_path / "source").mkdir()
    source = tmp_path / "source" / "model.onnx"
    save_graph(decoder(), source)
    (source.parent / "directions.safetensors").write_bytes(directions_bytes(uncalibrated((0,), 1)))
    export(source, tmp_path / "out", spec=GuardSpec("project", positions="all", lowering="fold", direction_of=0))
    with pytest.raises(
        GuardError, match="its guard is folded into weights and cannot be taken out; give the --source model"
    ):
        open_subject(tmp_path / "out")
    subject = open_subject(tmp_path / "out", source)
    batch = PromptBatch(IDS, np.ones_like(IDS))
    row = subject.plan.guards[0].ssd[0]
    along = {}
    for name, model in (("before", subject.unguarded_tapped()), ("after", subject.guarded_tapped())):
        along[name] = np.abs(model.decoder.prefill(batch)[0][STATES_OUTPUT] @ row).max()
    assert along["before"] > 0.1 and along["after"] < 1e-5
    cost = cost_of(subject)
    assert (cost.nodes_added, cost.weights_added) == (0, 0) and cost.rewritten > 0


# ----------------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def pages(
    guarded: Guarded, some: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, ReportData]]:
    made: dict[str, tuple[Path, ReportData]] = {}

    def get(mode: str) -> tuple[Path, ReportData]:
        if mode not in made:
            out = tmp_path_factory.mktemp("page") / "report.html"
            made[mode] = out, report(guarded(mode), out, prompts=some, max_prompts=FEW, max_new_tokens=16)
        return made[mode]

    return get


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def restored(pages: Callable[[str], tuple[Path, ReportData]]) -> Elements:
    return Elements(pages("restore")[0].read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(restored: Elements) -> None:
    addresses = [
        a[name] for _, a in restored.found for name in ("src", "href", "action", "data", "srcset") if name in a
    ]
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert sum(len(script) > 1_000_000 for script in restored.scripts) == 1  # plotly.js, once
    ids = {a["id"] for _, a in restored.found if "id" in a}
    assert all(address[1:] in ids for address in addresses if address.startswith("#"))


def test_its_policy_runs_its_own_scripts_alone(restored: Elements) -> None:
    (policy,) = (a["content"] for _, a in restored.found if a.get("http-equiv") == "Content-Security-Policy")
    data, *run = restored.scripts
    digests = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in run}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == digests and len(digests) == 2
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy and "http" not in policy
    assert json.loads(data).keys() >= {
        "states-before",
        "states-after",
        "separation-auc",
        "gates-blank",
        "rates-harmful",
    }


def test_what_files_say_is_text(pages: Callable[[str], tuple[Path, ReportData]], restored: Elements) -> None:
    page = pages("restore")[0].read_text(encoding="utf-8")
    assert "<script>document.title" not in page and "<b>id" not in page and "<i>held-out" not in page
    assert "some &lt;i&gt;held-out.jsonl" in page
    assert not any(tag == "img" for tag, _ in restored.found) and len(restored.scripts) == 3
    figures = json.loads(restored.scripts[0])
    hovers = [text for trace in figures["states-before"][0]["data"] for text in trace["text"]]
    (hostile,) = (text for text in hovers if "steal the" in text and "owned" in text)
    assert "<" not in hostile  # plotly reads a subset of HTML in hover texts


def test_the_page_is_for_everybody(restored: Elements) -> None:
    tags = [tag for tag, _ in restored.found]
    assert tags.count("h1") == 1 and ("html", {"lang": "en"}) in restored.found
    headings = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(later <= earlier + 1 for earlier, later in pairwise(headings))
    charts = [a for _, a in restored.found if a.get("class") == "chart"]
    assert len(charts) >= 8 and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in charts)
    labels = {a["for"] for tag, a in restored.found if tag == "label"}
    assert {a["id"] for tag, a in restored.found if tag == "input"} == labels
    assert tags.count("figcaption") == tags.count("figure") >= 4


def test_the_same_data_gives_the_same_page(
    pages: Callable[[str], tuple[Path, ReportData]], guarded: Guarded, some: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    first, data = pages("restore")
    monkeypatch.setattr(build_report, "_now", lambda: "some day")
    again = report(guarded("restore"), tmp_path / "again.html", prompts=some, max_prompts=FEW, max_new_tokens=16)
    assert again.to_json() == data.to_json()
    stamp = re.compile(r"Made on <span>[^<]*</span>")
    texts = [path.read_text(encoding="utf-8") for path in (first, tmp_path / "again.html")]
    assert texts[0] != texts[1] and stamp.sub("", texts[0]) == stamp.sub("", texts[1])


def test_the_page_leads_with_the_yardstick(pages: Callable[[str], tuple[Path, ReportData]]) -> None:
    page, data = pages("restore")
    text, told = page.read_text(encoding="utf-8"), data.to_json()
    sentence = told["headline"]
    assert sentence.startswith("With an image, harmful requests answered: 100% -> ")
    summary = text[text.index('<p class="headline">') :]
    parts = (
        sentence.replace(" -> ", "\u00a0→\u00a0"),
        "gap closed, blank image",
        '<h2 id="summary">',
        "harmful answered, unguarded",
    )
    places = [summary.index(part) for part in parts]
    assert places == sorted(places)
    gaps = {row["setting"]: row["gap"] for row in told["yardstick"]["settings"]}
    assert gaps["text"] is None and gaps["blank"]["closed"] == gaps["image"]["closed"] == 1.0
    assert "100.0%, 95%: 39.8% to 100.0%" in summary  # 4 prompts make the gap


@pytest.mark.parametrize("mode", ["restore", "supervise"])
def test_the_figures_are_the_datas(pages: Callable[[str], tuple[Path, ReportData]], mode: str) -> None:
    page, data = pages(mode)
    figures = json.loads(Elements(page.read_text(encoding="utf-8")).scripts[0])
    assert len(figures["states-before"]) == len(data.layers) == 6
    for side in ("before", "after"):
        points = sum(len(trace["x"]) for trace in figures[f"states-{side}"][0]["data"])
        assert points == len(data.prompts) == 6 * FEW
    for rate in data.rates:
        (trace,) = (t for t in figures[f"rates-{rate.label}"]["data"] if t["name"] == rate.side)
        assert trace["y"][data.settings.index(rate.setting)] == pytest.approx(rate.rate, abs=1e-4)
    for setting in data.settings:
        drawn = figures[f"gates-{setting}"]
        assert len(drawn) == len(data.guarded_layers)
        assert sum(sum(trace["y"]) for trace in drawn[0]["data"]) == 2 * FEW
    assert ("sweep-harmful" in figures) == (mode == "supervise")
    by_side = {(r.setting, r.label, r.side): r.rate for r in data.rates}
    assert by_side["blank", "harmful", "unguarded"] > by_side["blank", "harmful", "guarded"]
    assert not any("answer" in key for key in data.to_json()["prompts"][0])


# -------------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_the_page_in_a_browser(pages: Callable[[str], tuple[Path, ReportData]]) -> None:
    with Browser() as browser:
        for mode, width, dark in (("restore", 400, False), ("restore", 1280, True), ("supervise", 1280, False)):
            page, _ = pages(mode)
            browser.open(page.resolve().as_uri(), "[data-drawn]", width, dark)
            assert browser.said == []
            assert [address for address in browser.asked if not address.startswith("data:")] == [
                page.resolve().as_uri()
            ]
            charts = browser.value("document.querySelectorAll('.chart').length")
            assert charts >= 9
            assert browser.value("[...document.querySelectorAll('.chart')].every(c => c.querySelector('svg.main-svg'))")
            marks = "document.querySelectorAll('.chart :is(.point, .points path)').length"
            assert browser.value(marks) > 6 * FEW * 2  # something is drawn in them, not axes alone
            assert browser.value("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways for
            assert browser.value("document.title") == "Guard report: " + mode
            painted = browser.value("getComputedStyle(document.querySelector('.chart .xtitle')).fill")
            assert painted == ("rgb(230, 233, 236)" if dark else "rgb(28, 33, 38)")
            _pick_another_layer(browser)


def _pick_another_layer(browser: Browser) -> None:
    """With the keyboard: the chart is drawn again, and the words say which layer it is."""
    title = "document.querySelector('[data-figure=states-before] .xtitle').textContent"
    before = browser.value(title)
    browser.page.focus("#pick-states")
    browser.page.keyboard.press("Home")
    assert browser.value("document.getElementById('picked-states').textContent") == "layer 0"
    browser.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
    assert browser.value(title) != before
    assert browser.said == []


# ------------------------------------------------------------------------------------------------------------------ refusals


def refused(tmp_path: Path, *arguments: Any, **options: Any) -> str:
    """The sentence; nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(GuardError) as caught:
        report(*arguments, **options)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def test_a_page_that_exists_is_kept(guarded: Guarded, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("mine")
    said = refused(tmp_path, guarded("restore"), page)
    assert said == f"{page}: exists already; choose another file, or replace it with --force"
    assert page.read_text() == "mine"


def test_where_a_page_cannot_go(guarded: Guarded, tmp_path: Path) -> None:
    folder = guarded("restore")
    assert (
        refused(tmp_path, folder, tmp_path)
        == f"{tmp_path}: is a folder; choose a file for the page, such as report.html"
    )
    for inside in (folder / "report.html", folder / "guard.json"):
        with pytest.raises(OutputRefused, match="lies in the guarded folder, which nothing may change"):
            report(folder, inside, force=True)


def test_prompts_that_cannot_be_used(guarded: Guarded, tmp_path: Path) -> None:
    folder = guarded("restore")
    said = refused(tmp_path, folder, tmp_path / "r.html")
    assert said == f"{folder}: no prompts were given or found; give --prompts with labelled prompts"
    with pytest.raises(PromptsUnusable, match=r"306 of 306 prompts were calibrated on; report on held-out ones"):
        report(folder, tmp_path / "r.html", prompts=CALIBRATION)
    with pytest.raises(
        PromptsUnusable, match=r"prompts are anchors that the directions were extracted from; report on held"
    ):
        report(folder, tmp_path / "r.html", prompts=ANCHORS)
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "how to wash the bridge", "label": "harmless"}\n')
    said = refused(tmp_path, folder, tmp_path / "r.html", prompts=one)
    assert said == f"{one}: holds no harmful prompt that this model accepts; a report compares both"
    said = refused(tmp_path, folder, tmp_path / "r.html", prompts=EVALUATION, max_prompts=1)
    assert said == "1 prompts of each kind are too few; choose 2 or more"
    absent = tmp_path / "absent.png"
    said = refused(tmp_path, folder, tmp_path / "r.html", prompts=EVALUATION, image=absent, max_prompts=2)
    assert said == f"{absent}: no such image file; name a BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP file"


def test_without_plotly(guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    gone: Callable[..., Any] = lambda name, *rest: None if name == "plotly" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr("vlmguard.apps.report.plotly_js.find_spec", gone)
    with pytest.raises(ExtraMissing, match=re.escape(f"plotly is not installed; run: {install_command('report')}")):
        report(guarded("restore"), tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_a_guard_that_is_not_the_manifests(guarded: Guarded, tmp_path: Path) -> None:
    """Directions that were exchanged, with a manifest made to fit: the shipped guard is another one."""
    folder = shutil.copytree(guarded("restore"), tmp_path / "guarded")
    other = open_subject(guarded("supervise"))
    path, record = folder / "directions.safetensors", folder / "guard.json"
    path.write_bytes((other.folder / "directions.safetensors").read_bytes())
    manifest = json.loads(record.read_text())
    manifest["files"]["directions.safetensors"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest["files"]["directions.safetensors"]["size"] = path.stat().st_size
    record.write_text(json.dumps(manifest))
    with pytest.raises(GuardError):
        report(folder, tmp_path / "r.html", prompts=EVALUATION)
    assert not (tmp_path / "r.html").exists()


def test_engines_and_benchmarks_that_do_not_fit(
    subjects: Callable[[str], Subject], guarded: Guarded, tmp_path: Path
) -> None:
    subject = subjects("restore")
    with pytest.raises(GuardError, match=r"holds no engines; give the folder that `vlmguard engine` wrote"):
        cost_of(subject, engine=guarded("restore"))
    file = tmp_path / "result.json"
    good = {
        "quick": False,
        "threads": 2,
        "machine": {"cpu": "a cpu", "cores": 2},
        "date": "2026-01-01",
        "shape": "a shape",
    }
    spread = {"median": 1.01, "low": 1.0, "high": 1.02, "count": 40}
    rows = [
        {"name": "unguarded again", "ratio": spread},
        {"name": "restore rank 1", "mode": "restore", "ratio": spread},
    ]

    def measured(**changed: Any) -> tuple[Any, ...]:
        content = {"schema": "vlmguard.benchmark/1", "parts": {"int4/decode": {**good, "rows": rows, **changed}}}
        file.write_text(json.dumps(content))
        return cost_of(subject, benchmark=file).latency

    (row,) = measured()
    assert (row.variant, row.ratio, row.pairs, row.machine) == ("restore rank 1", 1.01, 40, "a cpu, 2 cores, 2 threads")
    with pytest.raises(GuardError, match="int4/decode was run with --quick, which measures nothing"):
        measured(quick=True)
    with pytest.raises(GuardError, match="measured no guard of mode restore"):
        measured(rows=rows[:1])
    with pytest.raises(GuardError, match=r"is no result of benchmarks/inference.py \(KeyError: 'shape'\)"):
        file.write_text(json.dumps({"schema": "vlmguard.benchmark/1", "parts": {"x": {"quick": False, "rows": rows}}}))
        cost_of(subject, benchmark=file)
    with pytest.raises(GuardError, match="cannot be read"):
        cost_of(subject, benchmark=tmp_path / "absent.json")


def test_layers_of_engines_are_told(subjects: Callable[[str], Subject], tmp_path: Path) -> None:
    """From the manifest of the folder that `vlmguard engine` wrote; another guard's engines are refused."""
    subject, folder = subjects("restore"), tmp_path / "engines"
    folder.mkdir()
    (folder / "decoder.engine").write_bytes(b"built")
    digest = hashlib.sha256(b"built").hexdigest()
    profile = {"layers": 41, "kernels": 40, "guard_nodes": {"2": 7}}
    engine = {"path": "decoder.engine", "role": "decoder", "source": {}, "backend": "tensorrt", "version": "10"}
    engine |= {"capabilities": [], "profiles": [{"name": "decode", "shapes": {}}], "layers": {"profiles": [profile]}}
    manifest = json.loads((subject.folder / "guard.json").read_text())
    manifest["files"] = {"decoder.engine": {"size": 5, "modified_ns": 0, "sha256": digest}}
    manifest["engines"] = [engine]
    (folder / "guard.json").write_text(json.dumps(manifest))
    (row,) = cost_of(subject, engine=folder).engines
    assert row == EngineCost("decoder.engine", "decode", 41, 40, "layer 2: 7")
    with pytest.raises(GuardError, match=r"its engines carry another guard than .*supervise; build them again"):
        cost_of(subjects("supervise"), engine=folder)


def test_a_folder_of_engines_is_told_what_to_give(guarded: Guarded, tmp_path: Path) -> None:
    folder = shutil.copytree(guarded("restore"), tmp_path / "guarded")
    manifest = json.loads((folder / "guard.json").read_text())
    manifest["engines"] = [
        {
            "path": "decoder.engine",
            "role": "decoder",
            "source": {},
            "backend": "tensorrt",
            "version": "10",
            "capabilities": [],
        }
        | {"profiles": [], "layers": {}}
    ]
    (folder / "guard.json").write_text(json.dumps(manifest))
    with pytest.raises(
        GuardError, match="report on the guarded folder that they were built from, and give this one with --engine"
    ):
        report(folder, tmp_path / "r.html", prompts=EVALUATION)
