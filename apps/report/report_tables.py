"""The tables and words of a report: the same data as the figures, as numbers and text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...exporter.evaluation.intervals import Share
from ...exporter.evaluation.yardstick import Divergence, Gap
from ...graphs.modes import guard_mode
from .data import ReportData
from .figures import SETTING_SYMBOLS, SETTING_WORDS
from .outcomes import Rate
from .score_separation import READOUT, SSD, TEXT

Row = list[str]
NO_GAP = "no gap"
_NOTHING = "–"


def sections(data: ReportData) -> list[tuple[str, str]]:
    """Id and name of each section that has data."""
    named = (
        ("summary", "Summary", True),
        ("states", "States", True),
        ("separation", "Separation", data.separations),
        ("gates", "Gates", data.gates),
        ("refusals", "Refusals", True),
        ("strength", "Strength", data.sweep),
        ("cost", "Cost", True),
        ("guard", "The guard", True),
    )
    return [(id, name) for id, name, shown in named if shown]


def gaps_closed(data: ReportData) -> list[tuple[str, str, str, str]]:
    """Setting, gap closed, its interval, and the refusals that it is computed from; one row per setting with an image."""
    rows = []
    for found in data.yardstick.settings:
        gap = found.gap
        if gap is None:
            continue
        closed = NO_GAP if gap.closed is None else f"{gap.closed:.1%}"
        interval = "no interval: too few prompts have a gap"
        if gap.interval is not None:
            interval = "95% interval: {:.1%} to {:.1%}".format(*gap.interval)
        counts = (
            f"of {gap.guarded.of} harmful prompts {gap.text_only.hits} are refused as text only, "
            f"{gap.unguarded.hits} unguarded, {gap.guarded.hits} guarded"
        )
        rows.append((SETTING_WORDS[found.setting], closed, interval, counts))
    return rows


def filled(head: Row, rows: list[Row]) -> tuple[Row, list[Row]]:
    """The table without the columns that have a value in no row."""
    kept = [column for column in range(len(head)) if any(row[column] != _NOTHING for row in rows)]
    return [head[column] for column in kept], [[row[column] for column in kept] for row in rows]


def refusal_terms(data: ReportData) -> list[str]:
    """The terms of the first table: its columns, its settings, and the kinds of prompts that are in it."""
    rows = yardstick_table(data)
    kinds = [kind for kind in ("borderline", "harmful only in the picture") if any(row[1] == kind for row in rows)]
    return ["refused", "extra refusals", "missing refusals", *(SETTING_WORDS[name] for name in data.settings), *kinds]


def separation_terms(data: ReportData) -> list[str]:
    """The terms of the separation charts and their table."""
    along = {row.along for row in data.separations}
    anchors = ["anchors"] if data.anchors_auc else []
    return ["AUC", "d′", "score", *(name for name in (TEXT, SSD, READOUT) if name in along), *anchors]


def symbols(data: ReportData) -> str:
    """The marker of each setting."""
    named = [f"{SETTING_SYMBOLS[name].partition('-')[0]}: {name} ({SETTING_WORDS[name]})" for name in data.settings]
    return f"{', '.join(named).capitalize()}."


def yardstick_table(data: ReportData) -> list[Row]:
    """Setting, prompts, refused text-only, unguarded and guarded, gap closed, extra and missing refusals."""
    rows = []
    for found in data.yardstick.settings:
        setting = SETTING_WORDS[found.setting]
        for row in found.beyond:
            counts = [_share(share.hits, share.of) for share in (row.text_only, row.unguarded, row.guarded)]
            gap = _gap(found.gap) if row.label == "harmful" and found.gap is not None else _NOTHING
            rows.append([setting, row.label, *counts, gap, _bounded(row.extra), _bounded(row.missing)])
        if found.in_picture is not None:
            counts = [_share(share.hits, share.of) for share in found.in_picture]
            rows.append([setting, "harmful only in the picture", _NOTHING, *counts, _NOTHING, _NOTHING, _NOTHING])
    return rows


def first_tokens_table(data: ReportData) -> list[Row]:
    """Setting, harmless prompts, KL from the unguarded and from the text-only model."""
    return [
        [SETTING_WORDS[found.setting], str(found.from_unguarded.prompts)]
        + [_nats(kl) for kl in (found.from_unguarded, found.from_text_only)]
        for found in data.yardstick.settings
        if found.from_unguarded is not None and found.from_text_only is not None
    ]


def rates_table(data: ReportData) -> list[Row]:
    """Setting, harmful answered (unguarded, guarded), harmless refused (unguarded, guarded), with intervals."""
    cells = {(rate.setting, rate.label, rate.side): _rate(rate) for rate in data.rates}
    kinds = [(label, side) for label in ("harmful", "harmless") for side in ("unguarded", "guarded")]
    return [
        [SETTING_WORDS[setting], *(cells.get((setting, label, side), _NOTHING) for label, side in kinds)]
        for setting in data.settings
    ]


def separation_table(data: ReportData) -> list[Row]:
    """Guarded layers alone: layer, direction, setting, then AUC and d' without and with the guard."""
    rows: dict[tuple[int, str, str], dict[str, tuple[float, float | None]]] = {}
    for found in data.separations:
        if found.layer in data.guarded_layers:
            key = (found.layer, found.along, found.setting)
            rows.setdefault(key, {})[found.side] = (found.auc, found.d_prime)
    return [
        [str(layer), along, SETTING_WORDS[setting], *(_apart(sides.get(side)) for side in ("unguarded", "guarded"))]
        for (layer, along, setting), sides in sorted(rows.items(), key=lambda item: item[0][:2])
    ]


def gates_table(data: ReportData) -> list[Row]:
    """Layer, setting, threshold, and how often the gate opened for harmful and for harmless prompts."""
    return [
        [
            str(gate.layer),
            SETTING_WORDS[gate.setting],
            f"{gate.threshold:.4g}",
            _share(gate.opened("harmful"), len(gate.harmful)),
            _share(gate.opened("harmless"), len(gate.harmless)),
        ]
        for gate in data.gates
    ]


def sweep_table(data: ReportData) -> list[Row]:
    """Alpha, setting, label, refused."""
    return [
        [
            f"{strength.alpha:g}{' (shipped)' if strength.shipped else ''}",
            SETTING_WORDS[setting],
            label,
            _share(n, asked),
        ]
        for strength in data.sweep
        for setting, label, n, asked in strength.refused
    ]


def cost_table(data: ReportData) -> list[Row]:
    """What, without the guard, added by it."""
    cost = data.cost
    rows = [
        ["nodes of the decoder", f"{cost.nodes:,}", _added(cost.nodes_added, cost.nodes)],
        ["bytes of the decoder's weights", f"{cost.weights:,}", _added(cost.weights_added, cost.weights)],
    ]
    return rows + ([["weights that hold the guard", _NOTHING, f"{cost.rewritten} rewritten"]] if cost.rewritten else [])


def engines_table(data: ReportData) -> list[Row]:
    """Engine, profile, layers, kernels, where the guard is."""
    return [[row.engine, row.profile, str(row.layers), str(row.kernels), row.guard_nodes] for row in data.cost.engines]


def latency_table(data: ReportData) -> list[Row]:
    """Part, variant, ratio with its interval, pairs, model, machine, date."""
    return [
        [
            row.part,
            row.variant,
            f"{row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})",
            str(row.pairs),
            row.shape,
            row.machine,
            row.date,
        ]
        for row in data.cost.latency
    ]


def sites_table(data: ReportData) -> list[Row]:
    """Layer, how its sum is written, rank, threshold, strength, target."""
    return [
        [
            str(site["layer"]),
            str(site["kind"]),
            str(site["rank"]),
            *(_number(site.get(key)) for key in ("tau", "alpha")),
            ", ".join(map(_number, site["target"])) if site.get("target") else _NOTHING,
        ]
        for site in data.plan["sites"]
    ]


def proof_table(data: ReportData) -> list[Row]:
    """Check, compared, worst, limit, whether it holds, note; as the manifest recorded them."""
    return [
        [
            str(check["name"]),
            f"{check['compared']:,}",
            f"{check['worst']:.1e}",
            f"{check['limit']:.0e}",
            "yes" if check["ok"] else "NO",
            str(check.get("note", "")),
        ]
        for check in data.manifest.decoders[0].proof
    ]


def files_table(data: ReportData) -> list[Row]:
    """File, bytes, SHA-256."""
    return [
        [name, f"{record.size:,}", record.sha256 or "not hashed, as requested at export"]
        for name, record in data.manifest.files.items()
    ]


def sources_table(data: ReportData) -> list[Row]:
    """Guarded decoder, the file that it was made from, SHA-256."""
    return [
        [record.path, str(record.source.get("decoder", "")), str(record.source.get("sha256", ""))]
        for record in data.manifest.decoders
    ]


def facts(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The plain numbers, words and lists of them in a record; what is nested stands in the manifest below."""
    return [
        (key.replace("_", " "), _plain(value))
        for key, value in content.items()
        if value is not None and not isinstance(value, dict) and not _nested(value)
    ]


def gate_words(data: ReportData) -> str:
    return guard_mode(str(data.plan["mode"])).score


def has_text_direction(data: ReportData) -> bool:
    """Whether there were text prompts to fit the directions of every layer on."""
    return any(row.along == TEXT for row in data.separations)


def asked_at_each(data: ReportData) -> int:
    """Number of prompts per strength."""
    return sum(asked for *_, asked in data.sweep[0].refused)


def text_changed(data: ReportData) -> str:
    """Text-only answers that the guard changed."""
    changed = data.yardstick.text_changed
    return "no text-only prompts" if changed is None else _bounded(changed)


def checks_held(data: ReportData) -> int:
    """Number of checks of the proof that held when the folder was written."""
    return sum(bool(check["ok"]) for check in data.manifest.decoders[0].proof)


def _rate(rate: Rate) -> str:
    return f"{_share(rate.erred, rate.asked)}, 95%: {rate.low:.1%} to {rate.high:.1%}"


def _bounded(share: Share) -> str:
    low, high = share.interval
    return f"{_share(share.hits, share.of)}, 95%: {low:.1%} to {high:.1%}"


def _gap(gap: Gap) -> str:
    if gap.closed is None:
        return NO_GAP
    between = "no interval" if gap.interval is None else "95%: {:.1%} to {:.1%}".format(*gap.interval)
    return f"{gap.closed:.1%}, {between}"


def _nats(found: Divergence | None) -> str:
    if found is None:
        return _NOTHING
    low, high = found.interval
    return f"{found.mean:.2g} nats, 95%: {low:.2g} to {high:.2g}; at most {found.highest:.2g}"


def _share(count: int, total: int) -> str:
    return f"{count}/{total} ({count / total:.1%})" if total else _NOTHING


def _apart(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return _NOTHING
    area, distance = found
    return f"{area:.3f} / {_NOTHING if distance is None else f'{distance:.2f}'}"


def _added(added: int, total: int) -> str:
    return f"{added:,} ({added / total:.2%})" if total else f"{added:,}"


def _number(value: Any) -> str:
    return _NOTHING if value is None else f"{float(value):.4g}"


def _nested(value: Any) -> bool:
    return isinstance(value, list) and (len(value) > 32 or any(isinstance(item, dict | list) for item in value))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def joined(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
