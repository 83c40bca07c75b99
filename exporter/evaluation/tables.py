"""An evaluation in the terminal: refusals, attack success, gates and drift, each with its interval."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..terminal import show_found
from .bootstrap import LEVEL, Interval
from .outcome import KEYWORDS, Evaluation, Share


def show_evaluation(out: Console, result: Evaluation) -> None:
    """Tables first, then what has no table, then what to keep in mind."""
    show_found(out, result.found)
    _show_refusals(out, result)
    if any(label == "harmful" for _, label in result.kinds):
        _show_attacks(out, result)
    _show_drift(out, result)
    if result.gates_unread is not None:
        out.print(f"gates: not read ({escape(result.gates_unread)})", highlight=False)
    if result.same_source is False:
        out.print("[yellow]the guarded model was made from another file than this unguarded one[/yellow]")
    out.print(f"text-only answers that changed word for word: {result.text_answers_changed}")
    out.print(f"[dim]in brackets: {LEVEL:.0%} bootstrap intervals, seed {result.seed}[/dim]", highlight=False)


def _show_refusals(out: Console, result: Evaluation) -> None:
    """A refused harmless or borderline prompt is over-refusal; an open gate there is a false positive."""
    table = Table(title=f"{len(result.prompts)} prompts, refusals")
    gated = result.gates_unread is None
    for column in ("setting", "prompts", "unguarded", "guarded", *(("gate open",) if gated else ())):
        table.add_column(column)
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


def _interval(found: Interval, format: str) -> str:
    return f"[{found[0]:{format}}, {found[1]:{format}}]"
