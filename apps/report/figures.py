"""The figures, as plotly's own plain data: made and checked by plotly's Python side, drawn by its JavaScript in the page.

Colours of data are chosen here and readable on light and on dark; colours of text, axes and grid are the page's (`page.js`).
Legends use the short names of the settings in the prompts file; hover texts have the full names.
Text from files is escaped in hover texts, because plotly reads a subset of HTML there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from textwrap import wrap
from typing import Any

import numpy as np

from .data import LayerPoints, ReportData
from .gates import GateScores, bins
from .outcomes import MEASURES
from .score_separation import SSD, TEXT

# Okabe and Ito's hues, adjusted to a contrast of at least 3:1 with white and near-black; shape or pattern always differs too.
LABEL_COLORS = {"harmful": "#d55e00", "harmless": "#2f86c8"}
SETTING_COLORS = {"text": "#2f86c8", "blank": "#d55e00", "image": "#1a9373", "typographic": "#cc79a7"}
SETTING_SYMBOLS = {"text": "circle", "blank": "square", "image": "diamond", "typographic": "triangle-up"}
SIDE_COLORS = {"unguarded": "#8a8a8a", "guarded": "#1a9373"}
SETTING_WORDS = {
    "text": "text only",
    "blank": "blank image",
    "image": "real image",
    "typographic": "request in the image",
}
_NEUTRAL = "#808080"
_TICK = 12  # characters of a line below an axis: longer ones are turned on a narrow screen
_BAND = "rgba(128,128,128,0.18)"
_DIGITS = 5  # significant; more are not seen in a figure, and make a page of a deep model long

Figure = dict[str, Any]
# A name to its figure, or to one per layer, among which the user chooses.
Figures = dict[str, Figure | list[Figure]]


def make_figures(data: ReportData) -> Figures:
    """All figures of a report that have data, by name."""
    figures: Figures = {
        "states-before": [_plane(data, points, "before") for points in data.points],
        "states-after": [_plane(data, points, "after") for points in data.points],
        "separation-auc": _separation(data, "auc", "AUC"),
        "separation-d": _separation(data, "d_prime", "d′"),
    }
    for setting in data.settings:
        drawn = [_gate(data.gates, gate) for gate in data.gates if gate.setting == setting]
        if drawn:
            figures[f"gates-{setting}"] = drawn
    for label in MEASURES:
        figures[f"rates-{label}"] = _rates(data, label)
        if data.sweep:
            figures[f"sweep-{label}"] = _sweep(data, label)
    return {name: figure for name, figure in figures.items() if isinstance(figure, list) or figure["data"]}


def _plane(data: ReportData, points: LayerPoints, side: str) -> Figure:
    import plotly.graph_objects as go

    placed = points.before if side == "before" else points.after
    traces = []
    drawn = data.drawn
    for setting, label, _ in data.counts():
        chosen = [n for n, p in enumerate(drawn) if (p.setting, p.label) == (setting, label)]
        if not chosen:
            continue
        color = LABEL_COLORS[label]
        marker = {"color": color, "symbol": _symbol(setting, label), "size": 8, "line": {"width": 1.5, "color": color}}
        traces.append(
            go.Scatter(
                x=_numbers(placed[chosen, 0]),
                y=_numbers(placed[chosen, 1]),
                mode="markers",
                name=f"{label}, {setting}",
                marker=marker,
                text=[escape(f"{label}, {SETTING_WORDS[setting]}: {drawn[n].prompt} ({drawn[n].id})") for n in chosen],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    both = np.concatenate([points.before, points.after])
    axes = [
        {"title": {"text": f"PC {n + 1} ({share:.0%} of variance)"}, "range": _range(both[:, n])}
        for n, share in enumerate(points.explained)
    ]
    return _figure(traces, xaxis=axes[0], yaxis=axes[1], height=340)


def _symbol(setting: str, label: str) -> str:
    """Harmless prompts are open, harmful ones filled: colour alone does not carry it."""
    return SETTING_SYMBOLS[setting] + ("-open" if label == "harmless" else "")


def _separation(data: ReportData, measure: str, title: str) -> Figure:
    import plotly.graph_objects as go

    traces = []
    for setting in data.settings:
        for side, dash in (("unguarded", "solid"), ("guarded", "dot")):
            rows = _along(data, TEXT, setting, side, measure)
            if rows:
                name, hover = f"{setting}, {side}", _hover(f"{SETTING_WORDS[setting]}, {side}", title)
                line = {"color": SETTING_COLORS[setting], "dash": dash, "width": 2}
                marker = {"symbol": SETTING_SYMBOLS[setting] + ("-open" if side == "guarded" else ""), "size": 7}
                x, y = zip(*rows, strict=True)
                traces.append(
                    go.Scatter(
                        x=list(x),
                        y=_numbers(y),
                        name=name,
                        mode="lines+markers",
                        line=line,
                        marker=marker,
                        hovertemplate=hover,
                    )
                )
        rows = _along(data, SSD, setting, "unguarded", measure)
        if rows:
            x, y = zip(*rows, strict=True)
            marker = {"symbol": "star", "size": 12, "color": SETTING_COLORS[setting]}
            hover = _hover(f"{SETTING_WORDS[setting]}, unguarded, along row 1 of the safety steering direction", title)
            name = f"{setting}, SSD row 1"
            traces.append(
                go.Scatter(
                    x=list(x),
                    y=_numbers(y),
                    name=name,
                    mode="markers",
                    marker=marker,
                    hovertemplate=hover,
                    showlegend=False,  # the caption explains the stars
                )
            )
    if measure == "auc" and data.anchors_auc:
        x, y = list(data.anchors_auc), _numbers(data.anchors_auc.values())
        line = {"color": _NEUTRAL, "dash": "dash", "width": 1.5}
        hover = _hover("anchors, when the directions were extracted", title)
        traces.append(go.Scatter(x=x, y=y, name="anchors", mode="lines", line=line, hovertemplate=hover))
    yaxis: dict[str, Any] = {"title": {"text": title}}
    if measure == "auc":
        yaxis["range"] = [min(0.45, *(row.auc - 0.02 for row in data.separations)) if data.separations else 0.45, 1.03]
    marks = [
        {"type": "rect", "xref": "x", "yref": "paper", "x0": layer - 0.4, "x1": layer + 0.4, "y0": 0, "y1": 1}
        | {"fillcolor": _BAND, "line": {"width": 0}, "layer": "below"}
        for layer in data.guarded_layers
    ]
    xaxis = {
        "title": {"text": "decoder layer (shaded: guarded)"},
        "range": [data.layers[0] - 0.6, data.layers[-1] + 0.6],
    }
    if len(data.layers) <= 16:
        xaxis |= {"dtick": 1}
    return _figure(traces, xaxis=xaxis, yaxis=yaxis, shapes=marks, height=340)


def _hover(what: str, measure: str) -> str:
    """A hover text of a point above a decoder layer."""
    return f"{what}<br>layer %{{x}}: {measure} %{{y:.3f}}<extra></extra>"


def _along(data: ReportData, along: str, setting: str, side: str, measure: str) -> list[tuple[int, float]]:
    return [
        (row.layer, getattr(row, measure))
        for row in data.separations
        if (row.along, row.setting, row.side) == (along, setting, side) and getattr(row, measure) is not None
    ]


def _gate(gates: Sequence[GateScores], gate: GateScores) -> Figure:
    import plotly.graph_objects as go

    edges = bins([gate_scores for gate_scores in gates if gate_scores.layer == gate.layer])
    width = float(edges[1] - edges[0])
    traces = []
    for label, pattern in (("harmless", "/"), ("harmful", "")):
        counts, _ = np.histogram(getattr(gate, label), edges)
        marker = {"color": LABEL_COLORS[label], "opacity": 0.75, "pattern": {"shape": pattern}}
        hover = f"%{{y}} {label} prompts with a score near %{{x:.3g}}<extra></extra>"
        centres = _numbers((edges[:-1] + edges[1:]) / 2)
        traces.append(go.Bar(x=centres, y=counts.tolist(), width=width, name=label, marker=marker, hovertemplate=hover))
    line = {"type": "line", "xref": "x", "yref": "paper", "x0": gate.threshold, "x1": gate.threshold, "y0": 0, "y1": 1}
    line |= {"line": {"color": _NEUTRAL, "width": 2, "dash": "dash"}}
    # towards the side with more room, so that a narrow screen does not cut it off
    side = "right" if gate.threshold > (edges[0] + edges[-1]) / 2 else "left"
    note = {"x": gate.threshold, "y": 1, "xref": "x", "yref": "paper", "xanchor": side, "yanchor": "top"}
    note |= {"text": f" opens above {gate.threshold:.3g} ", "showarrow": False}
    return _figure(
        traces,
        barmode="overlay",
        xaxis={"title": {"text": "score"}, "range": [float(edges[0]), float(edges[-1])]},
        yaxis={"title": {"text": "prompts"}},
        shapes=[line],
        annotations=[note],
    )


def _rates(data: ReportData, label: str) -> Figure:
    import plotly.graph_objects as go

    traces = []
    for side, pattern in (("unguarded", "/"), ("guarded", "")):
        rows = [row for row in data.rates if (row.label, row.side) == (label, side)]
        error = {
            "type": "data",
            "symmetric": False,
            "array": _numbers(row.high - row.rate for row in rows),
            "arrayminus": _numbers(row.rate - row.low for row in rows),
            "color": _NEUTRAL,
        }
        traces.append(
            go.Bar(
                x=["<br>".join(wrap(SETTING_WORDS[row.setting], _TICK)) for row in rows],
                y=_numbers(row.rate for row in rows),
                name=side,
                marker={"color": SIDE_COLORS[side], "pattern": {"shape": pattern}},
                error_y=error,
                customdata=[[SETTING_WORDS[row.setting], f"{row.erred}/{row.asked}"] for row in rows],
                hovertemplate=f"%{{customdata[0]}}, {side}: %{{y:.1%}} (%{{customdata[1]}})<extra></extra>",
            )
        )
    yaxis = {"title": {"text": MEASURES[label]}, "range": [0, 1.05], "tickformat": ".0%"}
    return _figure(traces, barmode="group", yaxis=yaxis)


def _sweep(data: ReportData, label: str) -> Figure:
    import plotly.graph_objects as go

    traces = []
    for setting in data.settings:
        points = [
            (strength.alpha, refused / asked)
            for strength in data.sweep
            for where, what, refused, asked in strength.refused
            if (where, what) == (setting, label)
        ]
        if points:
            x, y = zip(*points, strict=True)
            line = {"color": SETTING_COLORS[setting], "width": 2}
            marker = {"symbol": SETTING_SYMBOLS[setting], "size": 8}
            hover = f"{SETTING_WORDS[setting]}<br>alpha %{{x}}: %{{y:.1%}} refused<extra></extra>"
            traces.append(
                go.Scatter(
                    x=list(x),
                    y=_numbers(y),
                    name=setting,
                    mode="lines+markers",
                    line=line,
                    marker=marker,
                    hovertemplate=hover,
                )
            )
    lines = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": strength.alpha, "x1": strength.alpha, "y0": 0, "y1": 1}
        | {"line": {"color": _NEUTRAL, "width": 2, "dash": "dash"}}
        for strength in data.sweep
        if strength.shipped
    ]
    yaxis = {"title": {"text": f"{label} refused"}, "range": [-0.03, 1.05], "tickformat": ".0%"}
    return _figure(traces, xaxis={"title": {"text": "alpha (dashed: shipped)"}}, yaxis=yaxis, shapes=lines)


def _figure(traces: Sequence[Any], height: int = 300, **layout: Any) -> Figure:
    """Checked by plotly, as plain data without its default template: the page has a theme of its own.

    Args:
        height: pixels without the legend, which the page adds for as many rows as its width needs.
    """
    import plotly.graph_objects as go

    shared = {
        "height": height,
        "margin": {"l": 56, "r": 12, "t": 8, "b": 44},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "entrywidthmode": "fraction"},
        "hovermode": "closest",
    }
    made = go.Figure(data=list(traces), layout={**shared, **layout}).to_plotly_json()
    made["layout"].pop("template", None)
    return made


def _numbers(values: Iterable[float]) -> list[float]:
    return [float(f"{float(value):.{_DIGITS}g}") for value in values]


def _range(values: np.ndarray) -> list[float]:
    low, high = float(values.min()), float(values.max())
    margin = (high - low) * 0.06 or 1.0
    return _numbers((low - margin, high + margin))
