"""The table of lowerings: ways of writing the guard's arithmetic into a graph.

A lowering knows arithmetic only. Where the guard goes in (`rewrite`) and which tokens it touches (`positions`) is not its
business, so each is one small module and all of them inherit the conformance test against the numpy reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from . import lowering_dense, lowering_lowrank
from .errors import GuardError
from .reference import LayerGuard
from .scribe import Scribe
from .spec import MODES


@dataclass(frozen=True)
class Lowering:
    """One way to write `h' = h + w V`.

    Attributes:
        name: what `--lowering` takes.
        modes: the modes that it can write.
        guarded: `(scribe, h, mode, layer, dtype, supervisor) -> (h', c)`.
        correction: the same, giving `delta` of `h' = h + delta`: what a fused skip-norm's branch needs.
        why: one clause for the plan.
        `h` is `[..., d]` in the stream's dtype; `supervisor` `[..., m]` float32; `c` the coordinates `[..., m]` float32,
        or `None` where the lowering does not compute them.
    """

    name: str
    modes: frozenset[str]
    guarded: LoweringFunction
    correction: LoweringFunction
    why: str


LoweringFunction = Callable[
    [Scribe, ir.Value, str, LayerGuard, str, "ir.Value | None"], "tuple[ir.Value, ir.Value | None]"
]

LOWERINGS: tuple[Lowering, ...] = (
    Lowering(
        "lowrank",
        frozenset(MODES),
        lowering_lowrank.guarded,
        lowering_lowrank.correction,
        "two skinny MatMuls per layer, the cheapest on ONNX Runtime, and every mode",
    ),
    Lowering(
        "dense",
        frozenset({"project"}),
        lowering_dense.guarded,
        lowering_dense.correction,
        "the literal h @ (I - V^T V), one d x d MatMul per layer",
    ),
)


def choose_lowering(name: str, mode: str) -> tuple[Lowering, str]:
    """The lowering for a mode, and the reason for the plan; `auto` takes the table's first that can.

    Raises:
        GuardError: unknown name, or one that cannot write this mode.
    """
    if name == "auto":
        chosen = next(lowering for lowering in LOWERINGS if mode in lowering.modes)
        return chosen, f"auto: {chosen.why}"
    by_name = {lowering.name: lowering for lowering in LOWERINGS}
    if name not in by_name:
        raise GuardError(f"lowering {name!r} is unknown; choose one of auto, {', '.join(by_name)}")
    if mode not in by_name[name].modes:
        able = [lowering.name for lowering in LOWERINGS if mode in lowering.modes]
        raise GuardError(f"lowering {name!r} cannot write mode {mode!r}; choose {' or '.join(able)}")
    return by_name[name], f"as asked: {by_name[name].why}"
