"""A report in the terminal: the headline, the figures of both sides, and where the page is."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...exporter.terminal import show_found
from .data import ReportData
from .outcomes import MEASURES


def show_report(out: Console, data: ReportData, name: str) -> None:
    show_found(out, data.found)
    out.print(f"[bold]{data.yardstick.headline.sentence}[/bold]", highlight=False)
    table = Table(title=escape(f"{data.name}: {len(data.prompts)} prompts"))
    for column in ("setting", "measure", "unguarded", "guarded"):
        table.add_column(column, overflow="fold")
    for before in (rate for rate in data.rates if rate.side == "unguarded"):
        after = next(
            rate
            for rate in data.rates
            if (rate.label, rate.setting, rate.side) == (before.label, before.setting, "guarded")
        )
        cells = (f"{rate.erred}/{rate.asked} ({rate.rate:.1%})" for rate in (before, after))
        table.add_row(before.setting, MEASURES[before.label], *cells)
    out.print(table)
    out.print(f"[bold]page[/bold]: {escape(name)}", soft_wrap=True, highlight=False)
