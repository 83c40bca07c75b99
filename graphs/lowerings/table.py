"""The table of lowerings: ways of writing the guard's arithmetic into a graph.

A lowering contains arithmetic only. `rewrite` places the guard and `positions` selects the tokens, so each lowering is one
small module and all of them inherit the conformance test against the numpy reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import onnx_ir as ir

from ..errors import GuardError
from ..modes import MODES
from ..node_builder import NodeBuilder
from ..reference import LayerGuard
from ..spec import MAX_RANK, Target
from . import dense, lowrank, rank1
from .fold import FOLD
from .task import Task, Written, WrittenWhole


def _never_whole(builder: NodeBuilder, h: ir.Value, task: Task) -> None:
    """Most lowerings write a correction and an Add."""


@dataclass(frozen=True)
class Lowering:
    """One way to write `h' = h + w V`.

    Attributes:
        name: what `--lowering` takes.
        modes: the modes that it can write.
        correction: `(builder, h, task) -> Written`, `h` `[batch, sequence, d]` in the stream's dtype.
        selects: `(mode, dtype of the stream) -> dtype of the task's selection`.
        why: one clause for the plan.
        target: the runtime that it was made for.
        most_rank: the largest rank that it is chosen for by itself.
        whole: `h'` in one step, for a lowering that can sometimes do without a correction, else `None`.
        score_unit: `(mode, numbers, dtype of the stream) -> power of two` that a gate's score is read in, for a lowering whose
            gates are written together for all layers (`graphs.shared_gates`); `None`: each layer has its gate to itself.
        supports_runtime_controls: whether each call can change strength and threshold (`graphs.runtime_controls`).
        takes_numbers: whether the text-only coordinates may come as single numbers (`Task.numbers`).
    """

    name: str
    modes: frozenset[str]
    correction: Callable[[NodeBuilder, ir.Value, Task], Written]
    selects: Callable[[str, str], str]
    why: str
    target: Target = "onnxruntime"
    most_rank: int = MAX_RANK
    whole: Callable[[NodeBuilder, ir.Value, Task], WrittenWhole | None] = _never_whole
    score_unit: Callable[[str, LayerGuard, str], float] | None = None
    supports_runtime_controls: bool = True
    takes_numbers: bool = False

    def guarded(self, builder: NodeBuilder, h: ir.Value, task: Task) -> tuple[ir.Value, Written | WrittenWhole]:
        """`h'`, and what was written for it."""
        done = self.whole(builder, h, task)
        if done is not None:
            return done.guarded, done
        written = self.correction(builder, h, task)
        return builder.op("guarded", "Add", [h, written.delta], like=h), written

    @property
    def writes_nodes(self) -> bool:
        """False for `fold`, which changes weights."""
        return self is not FOLDED


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(
        "lowrank",
        frozenset(MODES),
        lowrank.correction,
        lowrank.selects,
        "two skinny MatMuls per layer, the cheapest on ONNX Runtime, and every mode (on TensorRT rank1 is cheaper)",
        score_unit=lowrank.score_unit,
    ),
    Lowering(
        "rank1",
        frozenset(MODES),
        rank1.correction,
        rank1.selects,
        "a chain of Mul and ReduceSum per row, which TensorRT fuses into the next norm, and every mode "
        "(on ONNX Runtime lowrank is cheaper)",
        target="tensorrt",
        most_rank=8,  # a chain per row; up to 8 rows are fused (TensorRT-RTX 1.7)
        takes_numbers=True,
    ),
    Lowering(
        "dense",
        frozenset({"project"}),
        dense.correction,
        dense.selects,
        "the literal h @ (I - V^T V), one d x d MatMul per layer (to compare with; the others cost less)",
        whole=dense.whole,
        supports_runtime_controls=False,
    ),
)


def _no_node(*_: object) -> NoReturn:
    raise AssertionError("fold writes no node; rewrite calls lowerings.fold")


FOLDED = Lowering(
    FOLD,
    frozenset({"project"}),
    _no_node,
    _no_node,
    "the projection is in the weights that write the stream, no node and no cost, the same in every layer and at every token",
    supports_runtime_controls=False,
)


def choose_lowering(name: str, mode: str, target: Target = "onnxruntime", rank: int = 1) -> tuple[Lowering, str]:
    """The lowering for a mode, and the reason for the plan; `auto`: the first of the table for the target and the rank.

    Args:
        name: of a lowering, or `auto`.
        mode: the guard's mode.
        target: the runtime.
        rank: rows of the direction.

    Raises:
        GuardError: unknown name, or a lowering that cannot write this mode.
    """
    if name == "auto":
        able = [lowering for lowering in LOWERINGS if mode in lowering.modes]
        made_for = next(lowering for lowering in able if lowering.target == target)
        if rank <= made_for.most_rank:
            return made_for, f"auto: {made_for.why}"
        chosen = next(lowering for lowering in able if rank <= lowering.most_rank)
        return chosen, f"auto: {made_for.name} writes a chain for each row, too many at rank {rank}; {chosen.why}"
    by_name = {lowering.name: lowering for lowering in (*LOWERINGS, FOLDED)}
    if name not in by_name:
        raise GuardError(f"lowering {name!r} is unknown; choose one of auto, {', '.join(by_name)}")
    if mode not in by_name[name].modes:
        able = [lowering.name for lowering in LOWERINGS if mode in lowering.modes]
        raise GuardError(f"lowering {name!r} cannot write mode {mode!r}; choose {' or '.join(able)}")
    return by_name[name], f"as requested: {by_name[name].why}"


def lowering_named(name: str) -> Lowering | None:
    """The lowering of this name; `None` for one that writes no nodes (`fold`)."""
    return next((lowering for lowering in LOWERINGS if lowering.name == name), None)
