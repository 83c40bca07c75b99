"""Runtime controls: values that an app sets, reads or holds at each call of a guarded graph. All are off by default.

Knobs are overridable initializers: inputs that have a default in the file (ONNX IR version 4 and later), so that a caller who
does not feed them gets the guard as it was calibrated. There are two for the whole guard, and not two per layer: an app
decides how much of the guard a request gets, calibration decides how the layers share it.

    vlmguard.strength          float32 [], default 1: every edit is multiplied with it, cut to 0 .. 2; 0 only observes
    vlmguard.threshold_offset  float32 [], default 0: added to every layer's threshold, in the units of its score

Telemetry is one output, `vlmguard.gate_scores` `[batch, guarded layers]` float32: what each gate compares, at the last token.

A held gate is a state in the style of the KV cache, `[batch, guarded layers]` float32: `vlmguard.past_gate` goes in, and
`vlmguard.present_gate` comes out: 1 open, 0 closed. Whoever feeds a number below 0 (a prompt has no past) has it decided now.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from .errors import GuardError
from .lowerings.gate import bounded
from .lowerings.task import Held
from .modes import guard_mode
from .node_builder import NodeBuilder
from .reference import LARGEST_OFFSET, LARGEST_STRENGTH

STRENGTH_INPUT = "vlmguard.strength"
OFFSET_INPUT = "vlmguard.threshold_offset"
SCORES_OUTPUT = "vlmguard.gate_scores"
PAST_GATE_INPUT = "vlmguard.past_gate"
PRESENT_GATE_OUTPUT = "vlmguard.present_gate"

# knob -> its default: the guard as it was calibrated
DEFAULTS: Mapping[str, np.ndarray] = {
    STRENGTH_INPUT: np.array(1, np.float32),
    OFFSET_INPUT: np.array(0, np.float32),
}
_OLDEST_IR = 4  # before it every initializer had to be an input, and so no input had a default


def knobs_of(mode: str) -> tuple[str, ...]:
    """The knobs that a mode has; an input that nothing reads would be a knob that does nothing."""
    return (STRENGTH_INPUT, OFFSET_INPUT) if guard_mode(mode).has_threshold else (STRENGTH_INPUT,)


def require_knobs(model: ir.Model, lowering: str, supported: bool) -> None:
    """The graph can have inputs with defaults, and the lowering numbers that a knob can reach.

    Args:
        lowering: name of the lowering.
        supported: whether it supports runtime controls.

    Raises:
        GuardError: one of them cannot.
    """
    if not supported:
        raise GuardError(
            f"lowering {lowering!r} has nothing that a knob could turn; choose lowrank, or leave --knobs out"
        )
    if model.ir_version is not None and model.ir_version < _OLDEST_IR:
        raise GuardError(
            f"the graph has IR version {model.ir_version}, an input with a default needs {_OLDEST_IR}; export it with a newer "
            "exporter, or leave --knobs out"
        )


def declare_knob(graph: ir.Graph, name: str) -> ir.Value:
    """The knob as an input of the top graph, and its default as an initializer of the same name."""
    tensor = ir.Tensor(DEFAULTS[name], name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]), const_value=tensor)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def take_back_inputs(graph: ir.Graph, names: Collection[str]) -> None:
    """Take inputs away, and their defaults; none but these."""
    for value in [value for value in graph.inputs if value.name in names]:
        graph.inputs.remove(value)
    for name in [name for name in graph.initializers if name in names]:
        graph.initializers.pop(name)


def is_default(value: ir.Value) -> bool:
    """Whether an initializer is a knob's default, to the bit."""
    default, tensor = DEFAULTS.get(value.name or ""), value.const_value
    if default is None or tensor is None or tensor.dtype != ir.DataType.FLOAT or tuple(tensor.shape):
        return False
    return tensor.tobytes() == default.tobytes()


def write_strength(builder: NodeBuilder, strength: ir.Value, dtype: str) -> ir.Value:
    """The strength in range, a scalar: a negative one would turn the guard round."""
    value = builder.op("strength", "Clip", [strength, *_range(builder, "strength", 0.0, LARGEST_STRENGTH)])
    return value if dtype == "float32" else builder.cast(f"strength_{dtype}", value, dtype)


def write_offset(builder: NodeBuilder, offset: ir.Value) -> ir.Value:
    """The threshold offset in range, a scalar: a listening pass stays below every threshold."""
    return bounded(builder, "threshold_offset", offset, "float32", LARGEST_OFFSET)


def write_held(builder: NodeBuilder, past: ir.Value, layers: Sequence[int]) -> dict[int, Held]:
    """The held gates at the start of a call, by layer, `[batch, 1, 1]`. Negative values and NaN mean undecided.

    Args:
        builder: adds the nodes.
        past: the input, `[batch, layers]` float32.
        layers: the guarded layers, in the order of its columns.
    """
    zero = builder.constant("zero", np.array(0), "float32")
    column = builder.op("column", "Unsqueeze", [past, builder.integers(-1)])
    undecided = builder.op("undecided", "Not", [builder.op("decided", "GreaterOrEqual", [column, zero])])
    parts = [
        builder.split(name, builder.cast(f"{name}_in_all", value, "float32"), [f"{name}_{n}" for n in layers], axis=1)
        for name, value in (
            ("deciding", undecided),
            ("is_open", builder.op("opened", "Greater", [column, zero])),
        )
    ]
    return {layer: Held(*both) for layer, both in zip(layers, zip(*parts, strict=True), strict=True)}


def notes_on(knobs: Collection[str], gate: str) -> list[str]:
    """Notes for the user on the runtime controls of a plan."""
    notes = []
    if knobs:
        names = ", ".join(knobs)
        notes.append(
            f"knobs {names}: inputs with defaults; callers can switch the guard off with them, so for "
            "untrusted callers leave --knobs out"
        )
    if gate == "prompt":
        notes.append(
            f"gate prompt: decided at the end of the prompt ({PAST_GATE_INPUT} below 0), then held; an app carries "
            f"{PRESENT_GATE_OUTPUT} there, and the caller who feeds it decides"
        )
    return notes


def _range(builder: NodeBuilder, name: str, lowest: float, highest: float) -> list[ir.Value]:
    return [
        builder.constant(f"{name}_{end}", np.array(bound), "float32")
        for end, bound in (("lowest", lowest), ("highest", highest))
    ]
