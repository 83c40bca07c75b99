"""Decoder state, recognised by structure: an input with the type and layout of an output that the graph computes from it.

State is what one call hands to the next: a KV cache (`[batch, heads, past, size]`), the window of a convolution, the matrix of
a linear attention. Exporters give it many names (`past_key_values.0.key`, `past_conv.0`, `input.cache.layers.0.keys`,
`past_key_values_0_0` with an output `linear_21`), so names only decide what structure leaves open.

The walk: from each output backwards, breadth first, to the nearest inputs of its layout. A cache enters its own output a
step or two before it (`Concat(past, new)`), and every other cache only through a layer. One attention node often updates key
and value together; then ports, names and order decide, in this order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from .dataflow import SHAPE_OPS, reads

_CACHE_AXES = 4  # [batch, heads, past, size], or more where keys and values are one tensor
# The names of the onnx-community layout, which our own conversion writes: `past_key_values.0.key` and `present.0.key`.
COMMUNITY_PAST, COMMUNITY_PRESENT = "past_key_values", "present"
# How names of one state begin on both sides; behind that they are the same, but for a plural.
_SIDE = re.compile(r"^((?:input|output)[._])?((past|present)(_key_values)?(\.layers)?|cache\.layers)(?=[._])")
_PAST_NAME = re.compile(r"^(input[._])?(past(_key_values)?|cache\.layers)(?=[._])(?!_sequence|_seen)")


@dataclass(frozen=True)
class StatePair:
    """One piece of state.

    Attributes:
        past: name of the input.
        present: name of the output that refills it.
        axis: of the input, the axis that grows with the tokens so far; `None` for a state of fixed size.
        capacity: length that `axis` has from the first call on, where the state is a ring that holds a window of tokens.
    """

    past: str
    present: str
    axis: int | None = None
    capacity: int | None = None


def state_pairs(graph: ir.Graph, no_inputs: Collection[str] = (), no_outputs: Collection[str] = ()) -> list[StatePair]:
    """The decoder state of a graph, in the order of its inputs.

    Args:
        graph: the top graph.
        no_inputs: inputs that are known to be something else (tokens, embeddings, mask).
        no_outputs: outputs that are known to be something else (logits).
    """
    inputs = [value for value in graph.inputs if value.name not in graph.initializers and value.name not in no_inputs]
    outputs = [value for value in graph.outputs if value.name not in no_outputs]
    nearest: dict[ir.Value, list[ir.Value]] = {}
    for output in outputs:
        fitting = {value for value in inputs if _same_layout(value, output)}
        if fitting and (near := _nearest(output, fitting)):
            nearest[output] = near
    pairs = _match(nearest, inputs)
    return [
        StatePair(str(past.name), str(pairs[past].name), _axis(past, pairs[past]), _window(past))
        for past in inputs
        if past in pairs
    ]


def is_longer(graph: ir.Graph, pair: StatePair) -> bool:
    """Whether the output of a pair continues its input: `[batch, heads, past, size]` with more tokens, as a KV cache."""
    past = next(value for value in graph.inputs if value.name == pair.past)
    present = next(value for value in graph.outputs if value.name == pair.present)
    if pair.axis is None or past.shape is None or present.shape is None or len(past.shape) < _CACHE_AXES:
        return False
    return size(past.shape[pair.axis]) != size(present.shape[pair.axis])


def pairs_by_name(inputs: Iterable[str], outputs: Iterable[str]) -> list[StatePair]:
    """Decoder state by its names alone, for an engine, whose graph cannot be read. The axis that grows is left open."""
    known = {state_name(name): name for name in outputs if _SIDE.match(name)}
    pasts = [name for name in inputs if is_past_name(name)]
    return [StatePair(name, known[state_name(name)]) for name in pasts if state_name(name) in known]


def is_past_name(name: str) -> bool:
    """Whether an input is called as exporters call decoder state: a hint, used where there is no structure to read."""
    return _PAST_NAME.match(name) is not None


def is_state_name(name: str) -> bool:
    """The same for an output or an input."""
    return _SIDE.match(name) is not None


def state_name(name: str) -> str:
    """Common part of the names of one state's input and output: `0.key` of `past_key_values.0.key`."""
    bare = _SIDE.sub("", name).lower()
    return re.sub(r"(key|value)s\b", r"\1", re.sub(r"[._]+", ".", bare)).strip(".")


def _same_layout(past: ir.Value, present: ir.Value) -> bool:
    """Same dtype and rank, the same sizes, but for the one axis that may grow. Unknown parts fit anything."""
    if past.dtype is None or (present.dtype is not None and past.dtype != present.dtype):
        return False
    if past.shape is None or present.shape is None:
        return past.shape is not None and len(past.shape) > 1
    if len(past.shape) != len(present.shape) or not len(past.shape):
        return False
    sizes = zip(map(size, past.shape), map(size, present.shape), strict=True)
    return sum(a != b for a, b in sizes if isinstance(a, int) or isinstance(b, int) if None not in (a, b)) <= 1


def size(dim: int | ir.SymbolicDim) -> int | str | None:
    """A fixed size as an int (some exporters write digits where names belong), a named one as its name, else `None`."""
    if isinstance(dim, int):
        return dim
    name = dim.value
    return int(name) if name is not None and re.fullmatch(r"[0-9]+", name) else name


def _nearest(output: ir.Value, fitting: set[ir.Value]) -> list[ir.Value]:
    """The inputs among `fitting` that the output is computed from in the fewest steps."""
    seen, layer = {output}, [output]
    while layer:
        found = [value for value in layer if value in fitting and value is not output]
        if found:
            return found
        following: list[ir.Value] = []
        for value in layer:
            for source in _sources(value):
                if source not in seen:
                    seen.add(source)
                    following.append(source)
        layer = following
    return []


def _sources(value: ir.Value) -> Iterator[ir.Value]:
    """Inputs of the node that computes a value; for an `If` the results of its branches."""
    node = value.producer()
    if node is None or (node.op_type in SHAPE_OPS and not node.domain):
        return
    if node.op_type == "If" and not node.domain:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                branch, index = attribute.as_graph(), value.index() or 0
                if index < len(branch.outputs):
                    yield branch.outputs[index]
        return
    yield from reads(node)


def _match(nearest: Mapping[ir.Value, Sequence[ir.Value]], inputs: Sequence[ir.Value]) -> dict[ir.Value, ir.Value]:
    """Input -> output, one to one."""
    pairs: dict[ir.Value, ir.Value] = {}
    waiting = dict(nearest)
    while waiting:
        left = {output: [value for value in near if value not in pairs] for output, near in waiting.items()}
        left = {output: near for output, near in left.items() if near}
        clear = {output: near[0] for output, near in left.items() if len(near) == 1}
        if clear:
            for past in dict.fromkeys(clear.values()):
                rivals = [output for output, near in clear.items() if near is past]
                pairs[past] = next((r for r in rivals if _alike(past, r)), rivals[0])
        elif left:
            past = next(value for value in inputs if any(value in near for near in left.values()))
            pairs[past] = _rival(past, left)
        taken = set(pairs.values())
        waiting = {output: near for output, near in left.items() if output not in taken}
    return pairs


def _rival(past: ir.Value, left: Mapping[ir.Value, Sequence[ir.Value]]) -> ir.Value:
    """The output for an input that shares its node with others: by the node's ports, else by name, else by order."""
    rivals = [output for output, near in left.items() if past in near]
    by_port = [output for output in rivals if _through_port(past, output, left[output])]
    if len(by_port) == 1:
        return by_port[0]
    return next((output for output in rivals if _alike(past, output)), rivals[0])


def _through_port(past: ir.Value, output: ir.Value, near: Sequence[ir.Value]) -> bool:
    """Whether a node that reads several states (key, value) gives them out in the order in which it reads them."""
    node = output.producer()
    if node is None or not all(value in node.inputs for value in near):
        return False
    read = [value for value in node.inputs if value in near]
    first = len(node.outputs) - len(read)  # what an attention node computes comes first, then its states
    return first >= 0 and node.outputs.index(output) - first == read.index(past)


def _alike(past: ir.Value, present: ir.Value) -> bool:
    return state_name(past.name or "") == state_name(present.name or "")


def _window(past: ir.Value) -> int | None:
    """Tokens in a ring cache: onnxruntime requires room for the whole window, in an empty cache too."""
    for node in past.consumers():
        window, ring = (node.attributes.get(name) for name in ("local_window_size", "sliding_window_cache"))
        if window is not None and ring is not None and ring.as_int() and window.as_int() > 0:
            return window.as_int()
    return None


def _axis(past: ir.Value, present: ir.Value) -> int | None:
    """The axis that grows: an open one whose size is another one behind; of several open ones the third of four."""
    sizes = [size(dim) for dim in past.shape or ()]
    open_axes = [axis for axis, length in enumerate(sizes) if axis and not isinstance(length, int)]
    if len(open_axes) < 2:
        return open_axes[0] if open_axes else None
    if present.shape is not None and len(present.shape) == len(sizes):
        named = [axis for axis in open_axes if sizes[axis] is not None]
        growing = [axis for axis in named if size(present.shape[axis]) not in (sizes[axis], None)]
        if len(growing) == 1:
            return growing[0]
    return 2 if len(sizes) == 4 else open_axes[-1]
