"""What a file says is seen on the terminal, and does nothing there."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from rich.table import Table

from vlmguard.exporter.terminal import SafeConsole, seen, to_json
from vlmguard.graphs.errors import GuardError

EVIL = ["\x1b[2J", "\x1b]0;title\x07", "\r", "\x08", "\x9b31m", "\x7f", "\u202e", "\u2028", "\x00"]


@pytest.mark.parametrize("evil", EVIL)
def test_a_control_character_is_a_sign_like_any_other(evil: str) -> None:
    file = io.StringIO()
    console = SafeConsole(file=file, width=60)
    table = Table(title=f"title {evil}")
    table.add_column("name")
    table.add_row(f"row {evil}")
    console.print(table)
    console.print(f"text {evil}", markup=False)
    console.print(f"piece {evil}", end="", markup=False, soft_wrap=True)
    shown = file.getvalue()
    assert seen(shown) == shown
    assert "title" in shown and "row" in shown and "piece" in shown


def test_a_plain_console_would_let_it_through() -> None:
    """Why there is another one: rich takes a few control characters out, and not the one that starts a sequence."""
    for kind, obeys in ((Console, True), (SafeConsole, False)):
        file = io.StringIO()
        kind(file=file).print("a\x1b[2J\u202e", markup=False)
        assert (seen(file.getvalue()) != file.getvalue()) == obeys


def test_markup_in_a_name_is_text() -> None:
    from vlmguard.exporter.render import show_checks
    from vlmguard.graphs.proof.structure import Check

    file = io.StringIO()
    name = "[link=http://x]a[/link]"
    show_checks(SafeConsole(file=file, width=100), [Check(name, 1, 0, 0, True, name)], name)
    assert file.getvalue().count(name) == 4  # title, cell, and both parts of the note


def test_what_is_harmless_stays() -> None:
    text = "naïve Größe 漢字 \t tab\nline"
    assert seen(text) == text


def test_colours_are_the_consoles_own() -> None:
    file = io.StringIO()
    SafeConsole(file=file, force_terminal=True, color_system="standard").print("[red]no[/red]")
    assert file.getvalue() == "\x1b[31mno\x1b[0m\n"


@pytest.mark.parametrize("evil", EVIL)
def test_json_says_the_same_and_obeys_nothing(evil: str) -> None:
    content = {"name": f"a{evil}b", "größe": 1}
    text = to_json(content)
    assert json.loads(text) == content and "größe" in text
    assert seen(text) == text


@pytest.mark.parametrize(
    ("between", "lines"),
    [
        (None, "judging mode align: 2 of 5\njudging mode align: 4 of 5\n"),
        ("20", "judging mode align: 3 of 5\n"),
        ("0", ""),
    ],
)
def test_a_pipe_gets_a_line_every_so_many_seconds(
    monkeypatch: pytest.MonkeyPatch, between: str | None, lines: str
) -> None:
    """Ten, or what the variable says."""
    from vlmguard.exporter import render

    monkeypatch.delenv(render.PROGRESS_SECONDS)
    if between is not None:
        monkeypatch.setenv(render.PROGRESS_SECONDS, between)
    now = [100.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with render.bars(SafeConsole(file=file, width=60)) as watch:
        for done, seconds in enumerate((1, 8, 2, 9, 1)):
            now[0] += seconds
            watch("judging mode align", done, 5)
    assert file.getvalue() == lines


@pytest.mark.parametrize("between", ["often", "-1", "nan", "inf", ""])
def test_an_interval_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, between: str) -> None:
    from vlmguard.exporter import render

    monkeypatch.setenv(render.PROGRESS_SECONDS, between)
    with pytest.raises(GuardError) as refusal, render.bars(SafeConsole(file=io.StringIO())):
        pass
    assert str(refusal.value) == (
        f"VLMGUARD_PROGRESS_SECONDS is {between!r}; set it to a number of seconds, or to 0 for no lines"
    )
