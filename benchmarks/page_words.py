"""Words and tables of the pages that `report.py` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Parts = Mapping[str, Any]


def goal_words(
    what: str, found: float, limit: float, form: str, spread: Mapping[str, Any] | None = None, strictly: bool = False
) -> str:
    """One sentence: met or missed, with the figure, and whether its interval leaves that open."""
    met = found < limit if strictly else found <= limit
    figures = f"{form.format(found)}, the goal is {'below' if strictly else 'at most'} {form.format(limit)}"
    open_still = spread is not None and spread["low"] <= limit < spread["high"]
    if open_still and spread is not None:
        figures += f"; the interval {form.format(spread['low'])} to {form.format(spread['high'])} contains the limit"
    return f"- **{'Met' if met else 'Missed'}**: {what}: {figures}."


def ratio_cells(spread: Mapping[str, Any]) -> list[str]:
    return interval_cells(spread, "{:.4f}")


def interval_cells(spread: Mapping[str, Any], form: str) -> list[str]:
    between = [" to ".join(form.format(spread[end]) for end in ends) for ends in (("low", "high"), ("p10", "p90"))]
    return [form.format(spread["median"]), *between, str(spread["count"])]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kernels_words(part: Parts) -> list[str]:
    """The counts of `kernels.py`: kernels added in prefill / decode."""
    names = ("one engine, all", "one engine, last", "two engines, last")
    columns = ["lowering", "mode", "one engine, all", "one engine, last", "two engines, last", "of one row"]
    rows = []
    for row in part["rows"]:
        counts = [" / ".join(f"{count:+d}" if count else "0" for count in row[name][:2]) for name in names]
        rows.append([f"`{row['lowering']}`", row["mode"], *counts, f"{row[names[-1]][2]:+d}"])
    bare, apart = ("{} / {}".format(*part[name][:2]) for name in ("bare", "bare_separate"))
    about = (
        f"{part['builder']}, {part['layers']} layers, every one guarded, rank {part['rank']}; kernels of prefill / decode. "
        f"Without a guard: {bare} (one engine), {apart} (two engines), {part['bare_separate'][2]} in decode steps of one row."
    )
    return [about, markdown_table(columns, rows)]


def measured_on(parts: Iterable[Parts]) -> str:
    """One line per distinct machine and set of versions."""
    told = []
    for part in parts:
        machine, versions = part["machine"], part["versions"]
        shape = f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB, {machine['system']}"
        installed = ", ".join(f"{name} {version}" for name, version in versions.items())
        told.append(f"Measured on {part['date'][:10]} on {shape}; {part['threads']} threads. {installed}.")
    return "\n\n".join(dict.fromkeys(told))
