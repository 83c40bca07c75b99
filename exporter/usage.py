"""Checks of every command before heavy imports: help, paths, options without effect, closed pipes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ..graphs.places import expanded

# Arguments that are text, because a hub id or FORMAT:FILE is allowed too, and may be a path.
_PATHS_AS_TEXT = frozenset({"model", "checkpoint", "anchors", "calibration", "prompts", "sources"})


class Interrupted(BaseException):
    """Ctrl-C, with a sentence on what is kept: no `except Exception` on the way takes it for something else."""


EXPORT_PROGRAM = "vlmguard-export"  # a program of its own: `vlmguard export`
CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE has ended


def end_quietly() -> NoReturn:
    """End as a program does whose reader has gone (`| head -1`): without a word, and with SIGPIPE's exit code."""
    with contextlib.suppress(
        OSError, ValueError
    ):  # what is still buffered goes nowhere, and is not tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(CLOSED_PIPE)


@contextlib.contextmanager
def quiet_pipe() -> Iterator[None]:
    """typer turns a closed pipe into exit code 1; what happens inside ends as SIGPIPE would end it."""
    try:
        yield
    except BrokenPipeError:
        end_quietly()


def program_name(path: str) -> str:
    """The program as the user typed it; `vlmguard` where it was not started by a console script."""
    return EXPORT_PROGRAM if Path(path).stem == EXPORT_PROGRAM else "vlmguard"


class ProgramContext(typer.Context):
    """A context whose path is what the user typed: `vlmguard-export`, not `vlmguard export`."""

    @property
    def command_path(self) -> str:
        path = super().command_path
        if program_name(sys.argv[0]) == EXPORT_PROGRAM and path.startswith("vlmguard export"):
            return EXPORT_PROGRAM + path.removeprefix("vlmguard export")
        return path


class _Helped:
    """Help on a page of our own (`help_page`), and usage in errors in the same words."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from .help_page import help_page

        command: Any = self
        formatter.write(help_page(command, ctx, (command.epilog or "").splitlines()))

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        from .help_page import usage_pieces

        formatter.write_usage(ctx.command_path, usage_pieces(self, ctx))


class Group(_Helped, TyperGroup):
    """The program itself."""

    context_class = ProgramContext

    def make_context(self, *args: Any, **options: Any) -> Any:
        with quiet_pipe():  # `--help` is printed here
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with quiet_pipe():
            return super().invoke(ctx)


class Command(_Helped, TyperCommand):
    """A command whose paths may begin with `~`, and whose Ctrl-C reports what is kept."""

    context_class = ProgramContext

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name)
            is_text = param.name in _PATHS_AS_TEXT or getattr(getattr(param, "type", None), "name", "") == "path"
            ctx.params[param.name] = _with_home(value, is_text)
        return rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:  # the notes of those who keep something
            raise Interrupted("; ".join(getattr(stop, "__notes__", ()))) from None


class App(typer.Typer):
    """A program whose commands are all of the class `Command`."""

    def command(
        self, name: str | None = None, *, examples: tuple[str, ...] = (), panel: str = "", **options: Any
    ) -> Any:
        """Register a command.

        Args:
            examples: complete command lines for its help.
            panel: heading in the program's help that the command stands under.
            options: as typer has them.
        """
        options.setdefault("cls", Command)
        return super().command(name, epilog="\n".join(examples), rich_help_panel=panel or None, **options)


def require_effect(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """None of these options was given, because none of them changes anything here.

    Args:
        names: as the command's function has them.
        why: the end of the sentence "--NAME has no effect ...".

    Raises:
        typer.BadParameter: one was.
    """
    for name in names:
        if is_given(context, name):
            raise typer.BadParameter(f"--{name.replace('_', '-')} has no effect {why}; leave it out")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave this option, on the command line or in the environment."""
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _with_home(value: Any, is_text: bool) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_with_home(one, is_text) for one in value)
    if isinstance(value, Path):
        return expanded(value)
    if isinstance(value, str) and is_text:
        head, colon, rest = value.partition(":")
        if colon and rest.startswith("~"):
            return f"{head}:{expanded(Path(rest))}"
        return str(expanded(Path(value))) if value.startswith("~") else value
    return value
