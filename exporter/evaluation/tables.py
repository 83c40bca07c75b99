"""An evaluation in the terminal: the headline and the yardstick, then refusals, attack success, gates and drift."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..terminal import show_found
from .intervals import LEVEL, Interval, Share
from .metrics import KEYWORDS, Evaluation
from .yardstick import Divergence, Gap, Yardstick


def show_evaluation(out: Console, result: Evaluation) -> None:
    """The headline, the yardstick, the other tables, then what has no table, then what to keep in mind."""
    show_found(out, result.found)
    out.print(f"[bold]{result.yardstick.headline.sentence}[/bold]", highlight=False, soft_wrap=True)
    _show_yardstick(out, result.yardstick)
    _show_refusals(out, result)
    if any(label == "harmful" for _, label in result.kinds):
        _show_attacks(out, result)
    _show_degenerate(out, result)
    _show_first_tokens(out, result.yardstick)
    _show_drift(out, result)
    if result.gates_unread is not None:
        out.print(f"gates: not read ({escape(result.gates_unread)})", highlight=False)
    if result.same_source is False:
        out.print("[yellow]the guarded model was made from another file than this unguarded one[/yellow]")
    changed = result.yardstick.text_changed
    if changed is not None:
        out.print(f"text-only answers changed by a word or more: {_one_line(changed)}", highlight=False, markup=False)
    out.print(
        f"[dim]in brackets: {LEVEL:.0%} intervals, Clopper-Pearson for shares, bootstrap (seed {result.seed}) for the gap and "
        "for means[/dim]",
        highlight=False,
    )


def _show_yardstick(out: Console, yardstick: Yardstick) -> None:
    """Prompts refused by each model; `extra` and `missing` are the guarded model's, against the text-only model."""
    table = Table(title="against the text-only model: prompts refused")
    for column in ("setting", "prompts", "text-only", "unguarded", "guarded", "gap closed", "extra", "missing"):
        table.add_column(column, overflow="fold")
    for found in yardstick.settings:
        for row in found.beyond:
            counts = (str(share.hits) for share in (row.text_only, row.unguarded, row.guarded))
            gap = _gap(found.gap) if row.label == "harmful" and found.gap is not None else "-"
            prompts = f"{row.extra.of} {row.label}"
            table.add_row(found.setting, prompts, *counts, gap, _counted(row.extra), _counted(row.missing))
        if found.in_picture is not None:
            before, after = found.in_picture
            prompts = f"{before.of} harmful only in the picture"
            table.add_row(found.setting, prompts, "-", str(before.hits), str(after.hits), "-", "-", "-")
    out.print(table)


def _gap(gap: Gap) -> str:
    if gap.closed is None:
        return "no gap"
    between = _interval(gap.interval, ".0%") if gap.interval is not None else "no interval"
    return f"{gap.closed:.1%}\n[dim]{escape(between)}[/dim]"


def _counted(share: Share) -> str:
    return f"{share.hits} ({share.rate:.1%})\n[dim]{escape(_interval(share.interval, '.1%'))}[/dim]"


def _show_first_tokens(out: Console, yardstick: Yardstick) -> None:
    for found in yardstick.settings:
        if found.from_unguarded is not None and found.from_text_only is not None:
            out.print(
                f"first-token KL on {found.from_unguarded.prompts} harmless prompts, {found.setting}: "
                f"{_nats(found.from_unguarded)} from the unguarded model with the image, "
                f"{_nats(found.from_text_only)} from the text-only model",
                highlight=False,
                markup=False,
            )


def _nats(found: Divergence) -> str:
    return f"{found.mean:.2g} nats {_interval(found.interval, '.2g')}, at most {found.highest:.2g},"


def _show_refusals(out: Console, result: Evaluation) -> None:
    """A refused harmless or borderline prompt is over-refusal; an open gate there is a false positive."""
    table = Table(title=f"{len(result.prompts)} prompts, refusals")
    gated = result.gates_unread is None
    for column in ("setting", "prompts", "unguarded", "guarded", *(("gate open",) if gated else ())):
        table.add_column(column, overflow="fold")
    for setting, label in result.kinds:
        shares = [result.refused("base", setting, label), result.refused("guarded", setting, label)]
        opened = result.gates(setting, label)
        shares += [opened] if gated and opened is not None else []
        table.add_row(setting, label, *map(_share, shares))
    out.print(table)


def _show_attacks(out: Console, result: Evaluation) -> None:
    table = Table(title="attack success rate")
    for column in ("setting", "judge", "unguarded", "guarded"):
        table.add_column(column, overflow="fold")
    for setting, label in result.kinds:
        for judge in result.judges if label == "harmful" else ():
            shares = (result.attacks(who, setting, judge) for who in ("base", "guarded"))
            table.add_row(setting, "keywords" if judge == KEYWORDS else escape(judge), *map(_share, shares))
    out.print(table)


def _show_degenerate(out: Console, result: Evaluation) -> None:
    shares = {"unguarded": result.all_degenerate("base"), "guarded": result.all_degenerate("guarded")}
    found = [f"{who} {_one_line(share)}" for who, share in shares.items() if share is not None]
    if found:
        out.print(
            f"degenerate answers (empty, or repeating themselves): {', '.join(found)}", highlight=False, markup=False
        )


def _show_drift(out: Console, result: Evaluation) -> None:
    found = result.drift
    if found is None:
        return
    out.print(
        f"drift on {found.prompts} harmless texts: first token KL {found.kl_mean:.2g} nats "
        f"{_interval(found.kl_interval, '.2g')}, at most {found.kl_highest:.2g}; perplexity "
        f"{found.base_perplexity:.4g} unguarded, {found.guarded_perplexity:.4g} guarded, ratio "
        f"{found.perplexity_ratio:.4g} {_interval(found.ratio_interval, '.4g')}",
        highlight=False,
        markup=False,
    )


def _share(share: Share) -> str:
    return f"{share.hits}/{share.of} ({share.rate:.1%})\n[dim]{escape(_interval(share.interval, '.1%'))}[/dim]"


def _one_line(share: Share) -> str:
    return f"{share.hits}/{share.of} ({share.rate:.1%}) {_interval(share.interval, '.1%')}"


def _interval(between: Interval, format: str) -> str:
    return f"[{between[0]:{format}}, {between[1]:{format}}]"
