"""The command line: parse, call one function, print, return a code. Results go to stdout, progress and notes to stderr.

Exit codes: 0 done, 1 refused (one line with the reason and what to do next), 2 wrong usage, 130 interrupted, 141 the reader of
a pipe has gone. An error of vlmguard itself keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import warnings
from typing import IO, NoReturn

from rich.markup import escape
from typer.main import get_command

from .commands import check_commands, console, export_command, model_commands, run_commands, ship_commands
from .commands.application import PANELS, app
from .exporter.budget import kept
from .exporter.usage import EXPORT_PROGRAM, Interrupted, end_quietly
from .graphs.errors import GuardError

# Importing a module registers its commands.
COMMANDS = (export_command, model_commands, check_commands, run_commands, ship_commands)
app.registered_commands.sort(key=lambda command: PANELS.index(command.rich_help_panel))

# Shell completion, which typer makes for a program by its name.
INSTALL, SHOW, COMPLETES_EXPORT = "--install-completion", "--show-completion", "_VLMGUARD_EXPORT_COMPLETE"

# Errors of stdout itself, a file on a full disk.
_NOWHERE_TO_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Reasons for which the system refuses a path; wherever they happen, they are no bug of ours.
_OUT_OF_REACH = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS)


def main() -> NoReturn:
    """`vlmguard ...`"""
    if sys.argv[1:2] == [INSTALL]:
        _install_completion(sys.argv[1:])
    _run(sys.argv[1:])


def main_export() -> NoReturn:
    """`vlmguard-export ...`, which is `vlmguard export ...`."""
    if sys.argv[1:2] == [INSTALL]:
        _install_completion(sys.argv[1:])
    if sys.argv[1:2] == [SHOW]:
        app(sys.argv[1:], prog_name=EXPORT_PROGRAM)
    if COMPLETES_EXPORT in os.environ:  # the shell asks what may follow, and starts the program without arguments
        get_command(app).commands["export"].main([], prog_name=EXPORT_PROGRAM)  # type: ignore[attr-defined]
    _run(["export", *sys.argv[1:]])


def _install_completion(arguments: list[str]) -> NoReturn:
    """For both programs, whichever was asked."""
    for program in ("vlmguard", EXPORT_PROGRAM):
        try:
            app(arguments, prog_name=program)
        except SystemExit as done:
            if done.code:
                raise
    sys.exit(0)


def _run(arguments: list[str]) -> NoReturn:
    # Libraries warn about odd files and odd numbers: our own checks find them, and report them in one line.
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    try:
        try:
            with kept():
                app(arguments, prog_name="vlmguard", obj=arguments)
        finally:
            if sys.stdout is not None:  # `>&-` closes it
                sys.stdout.flush()  # here, where a full disk or a closed pipe is still reported in our words
    except BrokenPipeError:
        end_quietly()
    except GuardError as error:
        line = " ".join(str(error).split())
        console.err.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (Interrupted, KeyboardInterrupt) as stop:
        kept_so_far = str(stop) or "nothing was kept; run the same command again"
        console.err.print(f"interrupted: {escape(kept_so_far)}", highlight=False, soft_wrap=True)
        sys.exit(130)
    except OSError as error:
        if error.filename is not None and error.errno in _OUT_OF_REACH:
            line = f"{error.filename}: cannot be used ({error.strerror}); check the path and its permissions"
            console.err.print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
            sys.exit(1)
        if error.filename is not None or error.errno not in _NOWHERE_TO_WRITE:
            raise
        line = f"the result cannot be written ({error.strerror}); choose another place for it"
        console.err.print(f"[red]error:[/red] {line}", highlight=False, soft_wrap=True)
        stdout: IO[str] | None = sys.stdout
        with contextlib.suppress(OSError, ValueError):  # what is still buffered is not tried again at the end
            if stdout is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        sys.exit(1)
    sys.exit(0)
