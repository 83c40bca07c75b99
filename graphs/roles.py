"""Finds the role of each decoder input (tokens, embeddings, mask, positions, state), and the output with the logits.

Three sources, in this order: the folder's own config (`genai_config.json` names the graph's inputs and outputs), the usual
names of exporters, and the structure where it allows one answer: that exporters agree on, and the structure where it leaves
one answer:

- tokens: the integer input that indexes the embedding table; embeddings: the one float input `[batch, sequence, width]`
- mask: the integer input `[batch, total]` that is compared or summed; positions: the one that is rotated by, or that indexes
  a table of positions
- state: `decoder_state`

An input without a role is in none of the fields; the runner has to know its values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from .decoder_state import StatePair, pairs_by_name, size, state_pairs
from .whole_numbers import whole_number

# The names that exporters agree on (transformers, optimum, onnxruntime-genai, onnx-community).
TOKENS, EMBEDS, MASK, POSITIONS, LOGITS = "input_ids", "inputs_embeds", "attention_mask", "position_ids", "logits"
# 1 for the tokens of an image, which see one another in both directions, 0 for text (Gemma 3).
TOKEN_TYPES = "token_type_ids"
_DECLARED = "vlmguard.declared_names"
_GUARD = "vlmguard."
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})
# Operators that change an index's form but not its value.
FORMING = frozenset(
    {"Cast", "Identity", "Clip", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Transpose", "Slice"}
)
LOOKUPS = frozenset({"Gather", "GatherBlockQuantized"})
_ROTATED = frozenset({"Mul", "MatMul", "Einsum", "Concat", "Add", "Max", "Min"})
_WAVES = frozenset({"Cos", "Sin"})
_JUDGING = frozenset(
    {"ReduceSum", "CumSum", "Equal", "Not", "And", "Where", "Sub", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"}
    | {"GatherND", "Gather"}
)
_OF_IMAGES = ("pixel", "cross", "encoder", "image", "vision")


@dataclass(frozen=True)
class InputRoles:
    """Names of a decoder's inputs and outputs by what they are for; "" where the graph has no such thing.

    Attributes:
        tokens: token ids `[batch, sequence]`.
        embeds: embeddings `[batch, sequence, width]` in place of tokens.
        mask: 1 for tokens, 0 for padding, `[batch, past + sequence]`.
        positions: of the tokens, `[batch, sequence]`, or `[axes, batch, sequence]`.
        logits: the output that the next token is read from.
        states: what goes from call to call.
    """

    tokens: str = ""
    embeds: str = ""
    mask: str = ""
    positions: str = ""
    logits: str = ""
    states: tuple[StatePair, ...] = ()

    @property
    def text(self) -> str:
        """The input that the prompt comes in by: embeddings where there are such, else tokens."""
        return self.embeds or self.tokens

    @property
    def pasts(self) -> tuple[str, ...]:
        """Names of the inputs that are state."""
        return tuple(pair.past for pair in self.states)


@dataclass(frozen=True)
class DeclaredNames:
    """Names of the decoder's inputs and outputs in a folder's config.

    Attributes:
        names: standard name -> the graph's, as `genai_config.json` has them below `model.decoder.inputs` and `outputs`.
        states: `(past, present)` patterns, `%d` for the layer.
    """

    names: Mapping[str, str]
    states: tuple[tuple[str, str], ...] = ()

    def name(self, standard: str, known: Collection[str]) -> str:
        """The graph's name for a standard one: the declared one if the graph has it, else the standard one if it does."""
        declared = self.names.get(standard, "")
        return declared if declared in known else standard if standard in known else ""


NOTHING_DECLARED = DeclaredNames({})


def declared_by_genai(config: Mapping[str, Any]) -> DeclaredNames:
    """From the content of a `genai_config.json`; parts of another form than genai's are left out."""
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    sides = [decoder.get(side) if isinstance(decoder, dict) else None for side in ("inputs", "outputs")]
    inputs, outputs = (_texts(side) for side in sides)
    patterns = [
        (inputs[past], outputs[present])
        for past in inputs
        if past.startswith("past") and (present := past.replace("past", "present", 1)) in outputs
    ]
    return DeclaredNames(outputs | inputs, tuple(patterns))


def _texts(part: object) -> dict[str, str]:
    return {k: v for k, v in part.items() if isinstance(v, str)} if isinstance(part, dict) else {}


def declare(graph: ir.Graph, names: DeclaredNames) -> None:
    """Let the graph carry what its folder's config calls its inputs; it is not written into a file."""
    graph.meta[_DECLARED] = names


def input_roles(graph: ir.Graph) -> InputRoles:
    """The roles of a graph's inputs, from what was declared for it, from names and from structure."""
    declared: DeclaredNames = graph.meta.get(_DECLARED, NOTHING_DECLARED)
    inputs = {str(v.name): v for v in graph.inputs if v.name not in graph.initializers and not _is_guards(v)}
    outputs = {str(v.name): v for v in graph.outputs if not _is_guards(v)}
    roles = InputRoles(
        tokens=declared.name(TOKENS, inputs),
        embeds=declared.name(EMBEDS, inputs),
        mask=declared.name(MASK, inputs),
        positions=declared.name(POSITIONS, inputs),
        logits=declared.name(LOGITS, outputs) or _first_rows(outputs.values()),
    )
    if not roles.text:
        roles = replace(roles, tokens=_token_input(graph, inputs, roles))
    known = {roles.tokens, roles.embeds, roles.mask, roles.positions}
    guards = {str(v.name) for v in (*graph.inputs, *graph.outputs) if _is_guards(v)}
    per_token = {name for name, value in inputs.items() if _is_per_token(value, inputs.get(roles.text))}
    states = state_pairs(graph, known | guards | per_token, {roles.logits} | guards)
    roles = replace(roles, states=_declared_first(states, declared, inputs, outputs))
    rest = {name: value for name, value in inputs.items() if name not in {*known, *roles.pasts}}
    if not roles.text:
        roles = replace(roles, embeds=_embeds_input(rest))
    if not roles.positions:
        roles = replace(roles, positions=_only(_is_positions(value, graph) for value in rest.values()))
    if not roles.mask:
        text = inputs.get(roles.text)
        others = (value for name, value in rest.items() if name not in (roles.positions, roles.embeds))
        roles = replace(roles, mask=_only(_is_mask(value, text) for value in others))
    return roles


def roles_by_name(inputs: Collection[str], outputs: Collection[str]) -> InputRoles:
    """Roles by standard names alone, for an engine, whose graph cannot be read."""
    first = next((name for name in outputs if not name.startswith(_GUARD)), "")
    return InputRoles(
        tokens=NOTHING_DECLARED.name(TOKENS, inputs),
        embeds=NOTHING_DECLARED.name(EMBEDS, inputs),
        mask=NOTHING_DECLARED.name(MASK, inputs),
        positions=NOTHING_DECLARED.name(POSITIONS, inputs),
        logits=NOTHING_DECLARED.name(LOGITS, outputs) or first,
        states=tuple(pairs_by_name(inputs, outputs)),
    )


def _is_guards(value: ir.Value) -> bool:
    return (value.name or "").startswith(_GUARD)


def _first_rows(outputs: Iterable[ir.Value]) -> str:
    """The first float output of rank 2 or 3, as `anatomy` takes it; the first of all where no types are written."""
    values = list(outputs)
    floats = [v for v in values if v.dtype in _FLOATS and v.shape is not None and len(v.shape) in (2, 3)]
    return str((floats or values)[0].name) if values else ""


def _is_per_token(value: ir.Value, text: ir.Value | None) -> bool:
    """Whether an input has an entry for each token of the call, which no state has."""
    if text is None or text.shape is None or len(text.shape) < 2 or value.shape is None:
        return False
    length = size(text.shape[1])
    return isinstance(length, str) and length in [size(dim) for dim in value.shape]


def _declared_first(
    states: Iterable[StatePair], declared: DeclaredNames, inputs: Collection[str], outputs: Collection[str]
) -> tuple[StatePair, ...]:
    """The pairs, where the config names a present for a past that one."""
    named: dict[str, str] = {}
    for past, present in declared.states:
        if "%d" in past and "%d" in present:
            head, _, tail = past.partition("%d")
            for name in inputs:
                number = (
                    name[len(head) : len(name) - len(tail)] if name.startswith(head) and name.endswith(tail) else ""
                )
                if whole_number(number) is not None and (there := present.replace("%d", number, 1)) in outputs:
                    named[name] = there
    return tuple(replace(pair, present=named.get(pair.past, pair.present)) for pair in states)


# By structure


def _token_input(graph: ir.Graph, inputs: Mapping[str, ir.Value], roles: InputRoles) -> str:
    """The integer input that indexes the widest table; of several the one with as many rows as there are logits."""
    found: list[tuple[str, int, int]] = []  # input, rows, columns
    for name, value in inputs.items():
        if value.dtype in _INTEGERS and name not in (roles.mask, roles.positions):
            found += [(name, *shape) for shape in _tables(value)]
    widest = max((columns for _, _, columns in found), default=0)
    found = [entry for entry in found if entry[2] == widest]
    logits = next((value for value in graph.outputs if value.name == roles.logits), None)
    vocabulary = (
        size(logits.shape[-1]) if logits is not None and logits.shape is not None and len(logits.shape) else None
    )
    of_vocabulary = {name for name, rows, _ in found if rows == vocabulary}
    if len(of_vocabulary) == 1:
        return of_vocabulary.pop()
    most = max((rows for _, rows, _ in found), default=0)
    names = {name for name, rows, _ in found if rows == most}
    return names.pop() if len(names) == 1 else ""


def _tables(value: ir.Value) -> Iterator[tuple[int, int]]:
    """Rows and columns of the constant tables that a value indexes."""
    for node, port in _readers(value, FORMING):
        if node.op_type in LOOKUPS and port == 1 and (table := node.inputs[0]) is not None:
            shape = [size(dim) for dim in table.shape] if table.shape is not None else []
            if len(shape) == 2 and not _depends_on_inputs(table):
                rows, columns = shape
                yield (rows if isinstance(rows, int) else 0, columns if isinstance(columns, int) else 0)


def _depends_on_inputs(value: ir.Value, depth: int = 8) -> bool:
    """Whether a table is computed from what the graph is given; a table is a constant, or a step or two from one."""
    if value.is_initializer() or value.const_value is not None:
        return False
    node = value.producer()
    if node is None or depth == 0:
        return True
    return any(source is not None and _depends_on_inputs(source, depth - 1) for source in node.inputs)


def _embeds_input(rest: Mapping[str, ir.Value]) -> str:
    rows = [n for n, v in rest.items() if v.dtype in _FLOATS and v.shape is not None and len(v.shape) == 3]
    named = [name for name in rows if "embed" in name.lower()]
    return rows[0] if len(rows) == 1 else named[0] if len(named) == 1 else ""


def _is_positions(value: ir.Value, graph: ir.Graph) -> str:
    """Its name if the input is what tokens are rotated by, or indexes a constant table; else ""."""
    if (
        value.dtype not in _INTEGERS
        or value.shape is None
        or len(value.shape) not in (2, 3)
        or "type" in str(value.name)
    ):
        return ""
    for node, port in _readers(value, FORMING):
        if node.op_type == "RotaryEmbedding" and port == 1:
            return str(value.name)
        if (
            node.op_type in LOOKUPS
            and port == 1
            and node.inputs[0] is not None
            and not _depends_on_inputs(node.inputs[0])
        ):
            return str(value.name)
    rotated = any(node.op_type in _WAVES for node, _ in _readers(value, FORMING | _ROTATED))
    return str(value.name) if rotated else ""


def _is_mask(value: ir.Value, text: ir.Value | None) -> str:
    """Name of the input `[batch, total]` if it marks which tokens exist; else ""."""
    name = str(value.name)
    if value.dtype not in {*_INTEGERS, ir.DataType.BOOL} or value.shape is None or len(value.shape) != 2:
        return ""
    if "type" in name or any(word in name.lower() for word in _OF_IMAGES):
        return ""
    judged = any(node.op_type in _JUDGING for node, _ in _readers(value, FORMING))
    longer = text is not None and text.shape is not None and len(text.shape) > 1
    differs = longer and size(value.shape[1]) != size(text.shape[1])  # type: ignore[union-attr, index]
    return name if "mask" in name.lower() or (judged and differs) else ""


def _readers(value: ir.Value, through: Collection[str]) -> Iterator[tuple[ir.Node, int]]:
    """Every node that reads a value, or what the operators `through` make of it; with the port that it reads by."""
    waiting, seen = [value], {value}
    while waiting:
        for use in waiting.pop().uses():
            yield use.node, use.idx
            if use.node.op_type in through:
                for output in use.node.outputs:
                    if output not in seen:
                        seen.add(output)
                        waiting.append(output)


def _only(names: Iterable[str]) -> str:
    """The one name there is; "" for none and for several."""
    found = [name for name in names if name]
    return found[0] if len(found) == 1 else ""
