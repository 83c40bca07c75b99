"""`--help` of a command: usage, what it does, its options in panels, examples. Nothing is cut at any width of the terminal.

Our own layout, because typer's table gives every column a share of the width: at 60 columns it breaks names in the middle.
"""

from __future__ import annotations

import io
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text

from .terminal import SafeConsole

WIDEST = 110  # columns; longer lines are hard to read
_INDENT = 2
_LEFT = 26  # columns for the name of an option; a longer one has a line of its own
_NARROW = 72  # columns; below, what an option does stands under its name

OPTIONS, ARGUMENTS, COMMANDS, OTHER = "Options", "Arguments", "Commands", "Other"


def help_page(command: Any, context: Any, examples: Sequence[str]) -> str:
    """The page as text, with colours if stdout is a terminal and `NO_COLOR` is not set.

    Args:
        command: a command or a group of typer.
        context: its context, for the name that the user typed.
        examples: complete command lines.
    """
    terminal = SafeConsole(emoji=False)
    width = min(terminal.width, WIDEST)
    page = SafeConsole(
        file=io.StringIO(), width=terminal.width, force_terminal=sys.stdout.isatty() or None, emoji=False
    )
    for line in _lines(command, context, examples, width):
        page.print(line, soft_wrap=True, highlight=False)
    text = page.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    return text.rstrip("\n") + "\n"


def usage_pieces(command: Any, context: Any) -> str:
    """The usage after the command's name: `[OPTIONS] MODEL [OUT]`."""
    pieces = ["[OPTIONS]"]
    for param in command.get_params(context):
        if param.param_type_name == "argument":
            name = _argument_name(param)
            pieces.append(name if param.required else f"[{name}]")
    if hasattr(command, "commands"):
        pieces.append("COMMAND ...")
    return " ".join(pieces)


def _lines(command: Any, context: Any, examples: Sequence[str], width: int) -> Iterable[Text]:
    usage = f"{context.command_path} {usage_pieces(command, context)}"
    yield from _wrapped(f"Usage: {usage}", width, 0, 7)
    for paragraph in (command.help or "").split("\n\n"):
        yield Text()
        yield from _wrapped(paragraph, width, 0)
    for panel, rows in _panels(command, context).items():
        yield Text()
        yield Text(panel, style="bold")
        for name, meaning in rows:
            yield from _row(name, meaning, width)
    if examples:
        yield Text()
        yield Text("Examples", style="bold")
        for example in examples:
            yield from _example(example, width)


def _panels(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Heading -> rows of a name and what it means; what every command has comes last."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, sub in getattr(command, "commands", {}).items():
        if not sub.hidden:
            meaning = " ".join((sub.help or "").split("\n\n")[0].split())
            found.setdefault(getattr(sub, "rich_help_panel", None) or COMMANDS, []).append((name, meaning))
    last: list[tuple[str, str]] = []
    for param in command.get_params(context):
        if getattr(param, "hidden", False):
            continue
        default = ARGUMENTS if param.param_type_name == "argument" else OPTIONS
        panel = getattr(param, "rich_help_panel", None) or default
        rows = last if param.name in _EVERYWHERE else found.setdefault(panel, [])
        rows.append((_name(param), _meaning(param)))
    return found | ({OTHER: last} if last else {})


_EVERYWHERE = frozenset({"help", "version", "install_completion", "show_completion"})


def _argument_name(param: Any) -> str:
    name = (param.metavar or param.name.upper()).strip("[]")
    return f"{name}..." if param.nargs != 1 and not name.endswith("...") else name


def _name(param: Any) -> str:
    """`--prompt, -p TEXT`; a switch has no value and shows none."""
    if param.param_type_name == "argument":
        return _argument_name(param)
    names = ", ".join(param.opts) + "".join(f" / {other}" for other in param.secondary_opts)
    if param.is_flag or param.name in _EVERYWHERE:
        return names
    return f"{names} {param.metavar or param.name.rsplit('_', 1)[-1].upper()}"


def _meaning(param: Any) -> str:
    text = " ".join((param.help or "").split())
    notes = []
    if getattr(param, "envvar", None):
        notes.append(f"environment: {param.envvar}")
    is_switch = getattr(param, "is_flag", False) and not param.secondary_opts
    default = param.default
    if param.name not in _EVERYWHERE and not is_switch and default not in (None, [], ()) and not callable(default):
        shown = ("yes" if default else "no") if isinstance(default, bool) else f"{default}"
        notes.append(f"default: {shown}")
    if param.param_type_name == "option" and param.required:
        notes.append("required")
    return " ".join([text, *(f"({note})" for note in notes)]).strip()


def _row(name: str, meaning: str, width: int) -> Iterable[Text]:
    beside = width >= _NARROW and len(name) <= _LEFT
    if beside:
        first, *rest = _folded(meaning, width - _INDENT - _LEFT - 2) or [""]
        yield _styled(" " * _INDENT + name.ljust(_LEFT + 2), first)
        indent = _INDENT + _LEFT + 2
    else:
        for number, line in enumerate(_name_lines(name, width - _INDENT)):
            yield _styled(" " * (_INDENT if not number else _INDENT + 4) + line)
        indent = _INDENT + _LEFT + 2 if width >= _NARROW else _INDENT + 4
        rest = _folded(meaning, width - indent)
    yield from (Text(" " * indent + line) for line in rest)


def _name_lines(name: str, width: int) -> list[str]:
    """A long list of values is broken behind a bar."""
    lines = [""]
    for word in name.replace("|", "|\0").replace(" ", " \0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width - 4:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _styled(name: str, rest: str = "") -> Text:
    return Text.assemble((name, "cyan"), rest)


def _wrapped(text: str, width: int, indent: int, hanging: int = 0) -> Iterable[Text]:
    lines = _folded(" ".join(text.split()), width - indent - hanging) or [""]
    # The first line has no hanging indent: there is room for more, and the difference is not worth a second pass.
    yield from (Text(" " * (indent + (hanging if number else 0)) + line) for number, line in enumerate(lines))


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False)


def _example(example: str, width: int) -> Iterable[Text]:
    """A command line to paste, with backslashes at line ends."""
    lines = textwrap.wrap(example, max(width - _INDENT - 4, 20), break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines):
        more = " \\" if number < len(lines) - 1 else ""
        yield Text(" " * (_INDENT + (4 if number else 0)) + line + more)
