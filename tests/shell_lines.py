"""Checks a `vlmguard` command line as the program itself parses it, without running it."""

from __future__ import annotations

import shlex
from typing import Any

import typer

from vlmguard import cli

PROGRAMS = ("vlmguard", "vlmguard-export")


def wrong_usage(line: str) -> str | None:
    """The usage error of a command line that begins with `vlmguard` or `vlmguard-export`; `None` if it has none."""
    words = shlex.split(line, comments=True)
    arguments = words[1:] if words[0] == "vlmguard" else ["export", *words[1:]]
    group: Any = typer.main.get_command(cli.app)
    try:
        context = group.make_context("vlmguard", list(arguments), obj=arguments)
        rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
        name, command, rest = group.resolve_command(context, rest)
        command.make_context(name, rest, parent=context)
    except Exception as error:
        if type(error).__name__ in ("Exit", "NoArgsIsHelpError"):  # --help, --version
            return None
        if hasattr(error, "format_message"):
            return error.format_message()
        raise
    return None
