"""The application that every command is registered with, and the limits that apply to each of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from ..exporter.budget import (
    DEFAULT_SECONDS,
    MOST_MEMORY,
    MOST_SECONDS,
    free_memory,
    inside,
    memory_of,
    run_within,
)
from ..exporter.usage import App, Group
from ..graphs.errors import GuardError

if TYPE_CHECKING:
    pass

from .shared_options import limits

# Headings of `vlmguard --help`.
PANELS = "Guard a model", "Check a guarded folder", "Run a guarded folder", "Ship a guarded folder"
GUARD, CHECK, RUN, SHIP = PANELS

# A run from the model to a look at the result.
EXAMPLES = (
    "vlmguard-export model-folder",
    "vlmguard evaluate model-folder model-folder-guarded",
    "vlmguard playground model-folder-guarded",
)

app = App(
    name="vlmguard",
    cls=Group,
    help="Bake VLM-Guard's safety steering into an exported vision-language model, and prove that it is there.",
    epilog="\n".join(EXAMPLES),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"vlmguard {version('vlmguard')}")
        raise typer.Exit


@app.callback()
def budgeted(
    context: typer.Context,
    max_seconds: Annotated[
        float | None,
        limits(
            "--max-seconds",
            envvar=MOST_SECONDS,
            min=0,
            help="Time limit in seconds, 0 for none. (default: inspect 600, verify 14400, export 86400, others none)",
            metavar="SECONDS",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        limits(
            "--max-memory",
            envvar=MOST_MEMORY,
            help="Memory limit, e.g. 4G, 0 for none. (default: the free memory for inspect, verify and export, others none)",
            metavar="SIZE",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    arguments = context.obj
    if inside() or arguments is None or {"-h", "--help"} & {*arguments}:
        return
    seconds, memory = _budget(context.invoked_subcommand or "", max_seconds, max_memory)
    if seconds is not None or memory is not None:
        raise typer.Exit(run_within(arguments, seconds, memory))


def _budget(command: str, max_seconds: float | None, max_memory: str | None) -> tuple[float | None, int | None]:
    """Seconds and bytes that a command may take; `None` for no limit."""
    if max_seconds is not None and not max_seconds < 1e9:  # NaN too
        raise typer.BadParameter(f"--max-seconds {max_seconds}: is no time; write 600, or 0 for no limit")
    try:
        memory = None if max_memory is None else memory_of(max_memory)
    except GuardError as error:
        raise typer.BadParameter(str(error)) from None
    if command in DEFAULT_SECONDS and os.name == "posix":
        max_seconds = DEFAULT_SECONDS[command] if max_seconds is None else max_seconds
        memory = free_memory() if memory is None else memory
    return max_seconds or None, memory or None
