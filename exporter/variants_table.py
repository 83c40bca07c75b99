"""The precision variants of an export as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .variants import VariantRow


def show_variants(out: Console, variants: Sequence[VariantRow]) -> None:
    """Refusals of each precision variant, over all settings."""
    table = Table(title=f"refused without -> with the guard ({escape(variants[0].harmful.prompts)})")
    for column in ("decoder", "harmful", "harmless"):
        table.add_column(column, overflow="fold")
    for row in variants:
        shown = [f"{before} -> {after} of {asked}" for before, after, asked in map(row.counts, ("harmful", "harmless"))]
        own = ", fitted to its own states" if row.calibration is not None else ""
        table.add_row(escape(row.decoder) + own, *shown)
    out.print(table)
