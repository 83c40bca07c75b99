"""`guard.toml`: a guard in a file to read and edit, for `vlmguard-export --config guard.toml`.

    schema = "vlmguard.config/1"
    directions = "directions.safetensors"   # beside this file: the long vectors (SSD, readout)

    [guard]                                 # as the options of `vlmguard export`
    mode = "restore"
    layers = [3]
    rank = 1
    positions = "last"

    [layers.3]                              # the numbers of a layer; they override those of the directions file
    threshold = -1.25
    target = [0.71]                         # `restore`, `combined`: one number per row, `rank` of them
    text_threshold = 0.4                    # `combined`
    origin = [-5.0]                         # `supervise`

Calibration writes it. An unknown key is an error, because a misspelt threshold would weaken the guard. Measurements are in
comments.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit
from tomlkit import TOMLDocument
from tomlkit.items import Item

from ...graphs.directions import DIRECTIONS_FILE, Directions, LayerDirections
from ...graphs.errors import DirectionMismatch, GuardError, first_line
from ...graphs.modes import Number, guard_mode
from ...graphs.places import CONFIG, expanded, require_file
from ...graphs.spec import GuardSpec
from ...graphs.whole_numbers import whole_number
from .results import Calibration
from .toml_depth import require_shallow

CONFIG_NAME = "guard.toml"
SCHEMA = "vlmguard.config/1"
_TOP = ("schema", "directions", "guard", "layers")
_SINGLE = ("threshold", "text_threshold")
_NUMBERS = (*_SINGLE, "target", "origin")
_LARGEST_FILE = 1 << 20  # bytes
# tomlkit puts a new table right in front of the next.
_GLUED = re.compile(r"(?m)^([^#\n][^\n]*\n)(\[[^\n]*\][ \t]*(#[^\n]*)?$)")


@dataclass(frozen=True)
class GuardConfig:
    """A wish with its numbers.

    Attributes:
        spec: the options.
        directions: the file with the vectors.
        numbers: per layer `threshold` and `text_threshold` (a number), `target` and `origin` (one number per row), those given.
        text: the file's own text, with its comments.
    """

    spec: GuardSpec
    directions: Path
    numbers: Mapping[int, Mapping[str, Any]]
    text: str = field(default="", repr=False)

    def applied(self, found: Directions) -> Directions:
        """The directions with these numbers in place of the file's.

        Raises:
            DirectionMismatch: a layer that the directions lack, or another rank.
        """
        layers = {number: found.layers[number] for number in self.spec.layers or found.layers if number in found.layers}
        for number, given in self.numbers.items():
            if number not in layers:
                asked, held = (", ".join(map(str, some)) for some in (self.spec.layers or layers, found.layers))
                raise DirectionMismatch(
                    f"[layers.{number}] was given, the guard is wanted on layers {asked} and the directions hold {held}; leave "
                    "the table out, or extract directions for other layers (`vlmguard directions`)"
                )
            layers[number] = _with_numbers(layers[number], given, self.spec.rank)
        return replace(found, layers={**found.layers, **layers})


def config_of(calibration: Calibration, directions: str) -> str:
    """The text of a calibration's `guard.toml`, beside a directions file of that name."""
    chosen = calibration.directions
    guards = chosen.layers.values()
    spec = replace(
        calibration.spec,
        mode=chosen.mode,
        layers=chosen.recommended_layers,
        rank=next(iter(guards)).ssd.shape[0],
        alpha=chosen.alpha,
        tau=None,  # each layer has its own
    )
    return to_toml(spec, directions, chosen, _figures(calibration))


def to_toml(
    spec: GuardSpec, directions: str, found: Directions, comments: Iterable[str] = (), edited: str | None = None
) -> str:
    """The `guard.toml` of a calibrated guard.

    Args:
        spec: its settings.
        directions: name of the directions file beside it.
        found: the directions with the layers' numbers.
        comments: lines for the head of a new file.
        edited: the text of a `guard.toml` that was read (`GuardConfig.text`): its comments, order and spelling stay, and
            what it lacks is added.
    """
    document = _new_document(comments) if edited is None else tomlkit.parse(edited)
    _set(document, {"schema": SCHEMA, "directions": directions})
    default = GuardSpec()
    chosen = {one.name: getattr(spec, one.name) for one in fields(GuardSpec)}
    guard = _table_of(document, "guard")
    _set(guard, {name: value for name, value in chosen.items() if value != getattr(default, name) or name in guard})
    for number in spec.layers or found.layers:
        shown = _shown(found.layers[number], spec.mode, spec.rank)
        if shown:
            _set(_table_of(_table_of(document, "layers", only_tables=True), str(number)), shown)
    return _GLUED.sub(r"\1\n\2", tomlkit.dumps(document))


def read_config(path: Path | str) -> GuardConfig:
    """Read and check a `guard.toml`.

    Raises:
        GuardError: it cannot be read, or has an unknown key or value.
    """
    path = Path(path)
    content, text = _content(path)
    _only_known(path, "", content, _TOP)
    if content.get("schema") != SCHEMA:
        raise GuardError(
            f"{path}: schema is {content.get('schema')!r}, this version reads {SCHEMA!r}; calibrate again, or correct it"
        )
    guard, layers = (_table(path, name, content.get(name, {})) for name in ("guard", "layers"))
    _only_known(path, "guard.", guard, [one.name for one in fields(GuardSpec)])
    named = content.get("directions", DIRECTIONS_FILE)
    if not isinstance(named, str):
        raise GuardError(f"{path}: directions is {named!r}, expected the name of a file beside it")
    return GuardConfig(_spec(path, guard), _directions(path, named), _numbers(path, layers), text)


def require_directions(path: Path | str, config: GuardConfig) -> None:
    """The directions file that the config at `path` names is there.

    Raises:
        GuardError: it is not; the sentence has the full path, because names in a config are relative to its folder.
    """
    if not config.directions.is_file():
        raise GuardError(
            f"{path}: its directions file {config.directions.absolute()} is missing; names in a {CONFIG_NAME} are relative "
            "to its own folder, correct `directions` there"
        )


# Writing


def _shown(layer: LayerDirections, mode: str | None, rank: int | None) -> dict[str, Any]:
    """The numbers that the mode reads."""
    shown: dict[str, Any] = {}
    numbers = guard_mode(mode).numbers if mode is not None else frozenset[Number]()
    if "threshold" in numbers and layer.threshold is not None:
        shown["threshold"] = layer.threshold
    if "text_shift" in numbers and layer.text_threshold is not None:
        shown["text_threshold"] = layer.text_threshold
    if "target" in numbers and layer.target is not None:
        shown["target"] = layer.target[:rank]
    if "origin" in numbers and layer.origin is not None:
        shown["origin"] = layer.origin[:rank]
    return shown


def _new_document(comments: Iterable[str]) -> TOMLDocument:
    lines = (
        "A guard, to be read and edited. Export it again with",
        "    vlmguard-export MODEL --config guard.toml",
        *comments,
    )
    return tomlkit.parse("".join(f"{f'# {line}'.rstrip()}\n" for line in lines) + '\nschema = ""\ndirections = ""\n')


def _table_of(parent: Any, name: str, only_tables: bool = False) -> Any:
    """A table of a table, made if need be; `only_tables`: it has no keys of its own, and no heading."""
    if name not in parent:
        parent[name] = tomlkit.table(is_super_table=only_tables)
    return parent[name]


def _set(table: Any, values: Mapping[str, Any]) -> None:
    """Write values into a table; one that is there already keeps its spelling."""
    for name, value in values.items():
        new = _item(value)
        if name not in table or table[name].unwrap() != new.unwrap():
            table[name] = new


def _item(value: Any) -> Item:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tomlkit.value(f"[{', '.join(_item(one).as_string() for one in value)}]")
    return tomlkit.value(_number(value)) if isinstance(value, float) else tomlkit.item(value)


def _number(value: float) -> str:
    """The shortest decimal that gives the same float32 back: what a graph and a directions file hold."""
    text = np.format_float_scientific(value, trim="0") if abs(value) >= 1e9 else _plain(value)
    return text.replace("e+", "e")


def _plain(value: float) -> str:
    single = np.float32(value)
    return np.format_float_positional(single if float(single) == value else value, unique=True, trim="0")


def _figures(calibration: Calibration) -> list[str]:
    """The measurements as text lines."""
    held, chosen = calibration.held_out, calibration.chosen.candidate.to_json(calibration.mode)
    axes = ", ".join(f"{name} {value}" for name, value in chosen.items() if name not in ("layers", "rank"))
    lines = [
        "",
        f"Calibrated on {len(calibration.prompts)} prompts, over-refusal budget {calibration.budget:.1%}",
        *([f"chosen: {axes}"] if axes else []),
        "Refused                       harmful   harmless",
    ]
    rows = [
        ("unguarded", calibration.base),
        ("guarded", calibration.guarded),
        ("held out, unguarded", held.base),
        ("held out, guarded", held.guarded),
        *((f"held out, {control.name}", control.tally) for control in held.controls),
    ]
    lines += [
        f"  {name:<27} {result.worst('harmful'):>7.1%}   {result.worst('harmless'):>7.1%}" for name, result in rows
    ]
    return [*lines, "(worst setting; held out: prompts that no choice was made on)"]


# Reading


def _content(path: Path) -> tuple[dict[str, Any], str]:
    """The values and the text. Values come from Python's own parser, which strange files do not keep busy for minutes;
    `tomlkit` only sees files that were found to be in order."""
    require_file(path, CONFIG)
    if path.stat().st_size > _LARGEST_FILE:
        raise GuardError(f"{path}: {path.stat().st_size} bytes is too large for a {CONFIG_NAME}; give the right file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        require_shallow(text)
        return tomllib.loads(text), text
    except (OSError, ValueError, RecursionError) as error:
        raise GuardError(f"{path}: is not TOML ({first_line(error)}); correct it there") from None


def _directions(path: Path, named: str) -> Path:
    """The directions file, whose name is relative to the config; `~` is the user's home."""
    try:
        return path.parent / expanded(Path(named))
    except GuardError as error:
        raise GuardError(f"{path}: directions: {error}") from None


def _only_known(path: Path, where: str, found: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [key for key in found if key not in known]
    if unknown:
        raise GuardError(f"{path}: {where}{unknown[0]} is not known; expected {', '.join(known)}")


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GuardError(f"{path}: {name} is {value!r}, expected a table [{name}]")
    return value


def _spec(path: Path, guard: Mapping[str, Any]) -> GuardSpec:
    given = dict(guard)
    for name, kinds in _KINDS.items():
        if name in given and (
            isinstance(given[name], bool) != (kinds == (bool,)) or not isinstance(given[name], kinds)
        ):
            raise GuardError(f"{path}: guard.{name} is {given[name]!r}, expected {_WORDS[kinds]}")
    if "layers" in given:
        layers = given["layers"]
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in layers):
            raise GuardError(f"{path}: guard.layers is {layers!r}, expected layer numbers from 0, such as [3, 4]")
        given["layers"] = tuple(sorted(set(layers)))
    try:
        return GuardSpec(**given)
    except GuardError as error:
        raise GuardError(f"{path}: {error}") from None


_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("mode", "positions", "lowering", "target", "gate", "supervisor"), (str,)),
    **dict.fromkeys(("rank", "direction_of"), (int,)),
    **dict.fromkeys(("alpha", "tau"), (int, float)),
    **dict.fromkeys(("knobs", "telemetry"), (bool,)),
    "layers": (list,),
}
_WORDS = {
    (str,): "a text",
    (int,): "a whole number",
    (int, float): "a number",
    (list,): "a list",
    (bool,): "true or false",
}


def _numbers(path: Path, layers: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for key, value in layers.items():
        number = whole_number(key)
        if number is None:
            raise GuardError(f"{path}: layers.{key} is not known; expected a layer's number, as in [layers.3]")
        if str(number) != key:  # [layers.03] beside [layers.3] would win over it
            raise GuardError(f"{path}: layers.{key} is not how layer {number} is written; write [layers.{number}]")
        table = _table(path, f"layers.{key}", value)
        _only_known(path, f"layers.{key}.", table, _NUMBERS)
        for name, given in table.items():
            several = name not in _SINGLE
            numbers = given if several and isinstance(given, list) else [given]
            if isinstance(given, list) != several or not all(_is_number(number) for number in numbers):
                raise GuardError(
                    f"{path}: layers.{key}.{name} is {given!r}, expected {'a list of numbers' if several else 'a number'}"
                )
        found[number] = table
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _with_numbers(layer: LayerDirections, given: Mapping[str, Any], rank: int | None) -> LayerDirections:
    rows = rank or layer.ssd.shape[0]
    changed: dict[str, Any] = {
        name: np.array(given[name], np.float32) for name in ("target", "origin") if name in given
    }
    changed |= {name: float(np.float32(given[name])) for name in _SINGLE if name in given}
    kept = {name: getattr(layer, name)[:rows] for name in ("target", "origin") if getattr(layer, name) is not None}
    return replace(layer, ssd=layer.ssd[:rows], **{**kept, **changed})
