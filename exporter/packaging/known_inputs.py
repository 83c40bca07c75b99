"""Whether a decoder's inputs and outputs are those that a runtime feeds and reads, by name."""

from __future__ import annotations

import re
from collections.abc import Collection

import onnx_ir as ir

from ...graphs.dials import PAST_GATE_INPUT
from ...graphs.errors import GuardError
from ...graphs.plan import SUPERVISOR_INPUT

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_WHY = {
    SUPERVISOR_INPUT: "modes supervise and combined need a text-only pass before each answer; export in mode restore",
    PAST_GATE_INPUT: "a gate that is held needs its state carried from call to call; export without --gate prompt",
}


def require_known(decoder: ir.Model, where: str, runtime: str, known: Collection[str]) -> None:
    """Every input is fed by the runtime, every cache entry comes back.

    Args:
        decoder: the graph.
        where: its file, for the error.
        runtime: who will run it.
        known: names that it feeds besides `past_key_values.N.key` and `.value`.

    Raises:
        GuardError: it does not, and what to do instead.
    """
    outputs = {value.name for value in decoder.graph.outputs}
    defaults = decoder.graph.initializers  # knobs: left out, they are as calibrated
    for name in (str(value.name) for value in decoder.graph.inputs if value.name not in defaults):
        cache = _PAST.fullmatch(name)
        if cache is not None and f"present.{cache[1]}.{cache[2]}" in outputs:
            continue
        if cache is not None or name not in known:
            then = _WHY.get(name, "keep the layout that it has, or export the model with another exporter")
            raise GuardError(f"{where}: takes {name!r}, which {runtime} does not feed: {then}")
    if "logits" not in outputs:
        raise GuardError(f"{where}: gives no output 'logits', which {runtime} reads; keep the layout that it has")
