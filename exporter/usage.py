"""What every command checks before anything heavy is imported: paths, and options that would have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from ..graphs.places import expanded

# Arguments that are text, because a hub id or FORMAT:FILE is allowed too, and may be a path.
_PATHS_AS_TEXT = frozenset({"model", "checkpoint", "anchors", "calibration", "prompts", "sources"})


class Interrupted(BaseException):
    """Ctrl-C, with a sentence on what is kept: no `except Exception` on the way takes it for something else."""


class Command(TyperCommand):
    """A command whose paths may begin with `~`, and whose Ctrl-C reports what is kept."""

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

    def command(self, name: str | None = None, **options: Any) -> Any:
        options.setdefault("cls", Command)
        return super().command(name, **options)


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
