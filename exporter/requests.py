"""Checks the arguments of the Python API: wrong types are one-line errors, and keywords replace a `GuardSpec`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..graphs.errors import GuardError
from ..graphs.spec import GuardSpec, parse_layers

Layers = str | int | Iterable[int]


def require_path(value: Any, name: str) -> None:
    """A `TypeError` from the depths of pathlib names no argument; this error does.

    Args:
        value: of the argument.
        name: of the argument.

    Raises:
        GuardError: it is no path.
    """
    if not isinstance(value, str | os.PathLike):
        raise GuardError(f"{name} is {_shown(value)}; give a path, as text or as a pathlib.Path")


def spec_of(spec: GuardSpec | None, layers: Layers | None = None, **settings: Any) -> GuardSpec | None:
    """The requested guard: `spec`, or a spec of the settings, or `None` without either.

    Args:
        spec: a complete specification.
        layers: layer numbers from 0, or text such as `"2-4"` or `"auto"`.
        settings: attributes of `GuardSpec`; `None` leaves the default.

    Raises:
        GuardError: both were given, or a setting is of the wrong type or out of range.
    """
    named = {name: value for name, value in settings.items() if value is not None}
    if named.get("mode") == "auto":
        del named["mode"]
    if layers is not None:
        named["layers"] = layers_of(layers)
    if spec is not None and not isinstance(spec, GuardSpec):
        raise GuardError(f"spec is {_shown(spec)}; give a vlmguard.GuardSpec, or mode=... and layers=...")
    if spec is not None and named:
        raise GuardError(f"{', '.join(named)} and spec exclude each other; put them into the spec")
    for name, value in named.items():
        kinds = _KINDS.get(name)
        if kinds is not None and (not isinstance(value, kinds[0]) or isinstance(value, bool) is not (kinds[0] is bool)):
            raise GuardError(f"{name} is {_shown(value)}; give {kinds[1]}")
    if not named:
        return spec
    return replace(GuardSpec(), **named)


def layers_of(layers: Layers) -> tuple[int, ...] | None:
    """Sorted layer numbers, each once; `None` for `"auto"`.

    Raises:
        GuardError: neither numbers nor text such as `"2-4"`.
    """
    if isinstance(layers, str):
        return parse_layers(layers)
    try:
        numbers: list[Any] = [layers] if isinstance(layers, int) else list(layers)
    except TypeError:
        numbers = [layers]
    for number in numbers:
        if isinstance(number, bool) or not hasattr(number, "__index__") or int(number) < 0:
            raise GuardError(
                f"layers holds {_shown(number)}; give layer numbers from 0, as [2, 3], or text such as '2-4'"
            )
    return tuple(sorted({int(number) for number in numbers}))


def _shown(value: Any) -> str:
    """A value and its type, short enough for one line."""
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


_KINDS: dict[str, tuple[Any, str]] = {
    "mode": (str, "the name of a mode"),
    "rank": (int, "a whole number"),
    "alpha": (int | float, "a number"),
    "tau": (int | float, "a number"),
    "positions": (str, "last, all or prompt"),
    "gate": (str, "token or prompt"),
    "lowering": (str, "the name of a lowering"),
    "target": (str, "the name of a runtime"),
    "supervisor": (str, "input or rows"),
    "direction_of": (int, "a layer number"),
    "knobs": (bool, "True or False"),
    "telemetry": (bool, "True or False"),
}
