"""Whether a decoder's inputs and outputs are those that a runtime feeds and reads, by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import onnx_ir as ir

from ...graphs.decoder_state import COMMUNITY_PAST, COMMUNITY_PRESENT
from ...graphs.errors import GuardError
from ...graphs.plan import PROMPT_SUPERVISOR_INPUT, SUPERVISOR_INPUT
from ...graphs.roles import LOGITS, TOKEN_TYPES, input_roles
from ...graphs.runtime_controls import PAST_GATE_INPUT
from ...graphs.whole_numbers import whole_number

# Cache inputs supported by the runtimes: keys and values of a layer, with the names of the onnx-community layout.
_CACHE = re.compile(r"[0-9]+\.(key|value)")
_NO_STATES: Mapping[str, str] = {}
_WHY = {
    SUPERVISOR_INPUT: "modes supervise and combined need a text-only pass before each answer; export in mode restore",
    PROMPT_SUPERVISOR_INPUT: "a guard at the prompt's end needs a text-only pass before each answer; export with --supervisor "
    "rows where the app can batch the text with the prompt, else in mode restore",
    TOKEN_TYPES: "in this decoder the tokens of a picture see one another; package it with --genai, or keep the layout that "
    "it has",
    PAST_GATE_INPUT: "a gate that is held needs its state carried from call to call; export without --gate prompt",
}


def require_known(
    decoder: ir.Model, where: str, runtime: str, known: Collection[str], states: Mapping[str, str] = _NO_STATES
) -> None:
    """Every input is fed by the runtime, every cache entry comes back.

    Args:
        decoder: the graph.
        where: its file, for the error.
        runtime: who will run it.
        known: names that it feeds besides a cache called `past_key_values.N.key` and `.value`, `present.N.key` and `.value`.
        states: more state that it feeds, called `BEGINNING.N`: the beginning of the input's name -> of the output's.

    Raises:
        GuardError: it does not, and what to do instead.
    """
    outputs = {value.name for value in decoder.graph.outputs}
    pairs = {pair.past: pair.present for pair in input_roles(decoder.graph).states}
    defaults = decoder.graph.initializers  # knobs: left out, they are as calibrated
    for name in (str(value.name) for value in decoder.graph.inputs if value.name not in defaults):
        entry = name.removeprefix(f"{COMMUNITY_PAST}.")
        if name != entry and _CACHE.fullmatch(entry) and pairs.get(name) == f"{COMMUNITY_PRESENT}.{entry}":
            continue
        beginning, _, layer = name.rpartition(".")
        if whole_number(layer) is not None and pairs.get(name) == f"{states.get(beginning)}.{layer}":
            continue
        if name not in known:
            then = _WHY.get(name, "keep the layout that it has, or export the model with another exporter")
            raise GuardError(f"{where}: takes {name!r}, which {runtime} does not feed: {then}")
    if LOGITS not in outputs:
        raise GuardError(f"{where}: gives no output 'logits', which {runtime} reads; keep the layout that it has")
