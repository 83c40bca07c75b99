"""The graph's inputs that show where the tokens of one call lie: the attention mask, the positions and the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .errors import GuardError
from .roles import InputRoles, input_roles

_DECODER_MASK_INPUT = "decoder_attention_mask"  # a whole encoder-decoder: `attention_mask` is the encoder's there
_DECODER_TOKENS = frozenset({"decoder_input_ids", "decoder_inputs_embeds"})
_CACHE_RANKS = (4, 5)  # [batch, heads, past, size]; five axes where keys and values are one tensor


@dataclass(frozen=True)
class GrowingCache:
    """A KV cache input whose output is longer.

    Attributes:
        value: the input.
        axis: the axis that counts past tokens; where past and present share a buffer at run time, its capacity.
    """

    value: ir.Value
    axis: int


@dataclass(frozen=True)
class CallInputs:
    """Inputs of a graph that show the tokens of one call with `S` tokens.

    Attributes:
        mask: `[batch, T]`, nonzero for attended tokens; `T` is past + S, or more if the mask is static.
        positions: `[batch, S]`; `None` for M-RoPE, whose positions do not count tokens.
        cache: its length is the number of past tokens; `None` without a cache, or with one of fixed size.
    """

    mask: ir.Value | None = None
    positions: ir.Value | None = None
    cache: GrowingCache | None = None


def call_inputs(graph: ir.Graph) -> CallInputs:
    """Find them among the inputs of the top graph.

    Raises:
        GuardError: the mask is not `[batch, tokens]`.
    """
    roles = input_roles(graph)
    mask = _read_mask(graph, roles)
    if mask is None:
        return CallInputs()
    positions = _named(graph, roles.positions)
    if positions is not None and (positions.shape is None or len(positions.shape) != 2):
        positions = None
    return CallInputs(mask, positions, _growing_cache(graph, roles))


def hides_later_padding(graph: ir.Graph) -> bool:
    """Whether nothing shows where a call ends but the mask itself: a cache of fixed size, and no positions that count."""
    inputs = call_inputs(graph)
    return bool(input_roles(graph).states) and inputs.cache is None and inputs.positions is None


def mask_input(graph: ir.Graph) -> ir.Value | None:
    """The attention mask `[batch, tokens]` of the decoder's own tokens; `None` if the graph takes no mask.

    Raises:
        GuardError: it has another number of axes, so it shows which token attends to which, and not which are tokens.
    """
    return _read_mask(graph, input_roles(graph))


def readable_mask(graph: ir.Graph) -> str:
    """The name of a mask `[batch, tokens]`, or "" if the graph takes none, or another."""
    mask = _mask(graph, input_roles(graph))
    return mask.name or "" if mask is not None and _is_readable(mask) else ""


def _read_mask(graph: ir.Graph, roles: InputRoles) -> ir.Value | None:
    mask = _mask(graph, roles)
    if mask is None or _is_readable(mask):
        return mask
    shape = "no shape" if mask.shape is None else f"shape {[str(size) for size in mask.shape]}".replace("'", "")
    raise GuardError(
        f"{mask.name} has {shape}, and only a mask [batch, tokens] shows which token of a call is the last; export the "
        "decoder with such a mask, or choose --positions all"
    )


def _mask(graph: ir.Graph, roles: InputRoles) -> ir.Value | None:
    own = _named(graph, _DECODER_MASK_INPUT)
    if own is not None or any(_named(graph, name) for name in _DECODER_TOKENS):
        return own
    return _named(graph, roles.mask)


def _is_readable(mask: ir.Value) -> bool:
    return mask.shape is not None and len(mask.shape) == 2


def _named(graph: ir.Graph, name: str) -> ir.Value | None:
    return next((value for value in graph.inputs if name and value.name == name), None)


def _growing_cache(graph: ir.Graph, roles: InputRoles) -> GrowingCache | None:
    """The first piece of state whose output is longer on one axis, and alike on all others."""
    for pair in roles.states:
        past = _named(graph, pair.past)
        present = next((value for value in graph.outputs if value.name == pair.present), None)
        if past is None or present is None or past.shape is None or len(past.shape) not in _CACHE_RANKS:
            continue
        axis = _longer_axis(past, present)
        if axis is not None:
            return GrowingCache(past, axis)
    return None


def _longer_axis(past: ir.Value, present: ir.Value) -> int | None:
    """The one axis behind the batch's on which the sizes differ; `None`: there is no such axis."""
    if past.shape is None or present.shape is None or len(past.shape) != len(present.shape):
        return None
    sizes = list(zip(past.shape, present.shape, strict=True))
    differing = [axis for axis, (a, b) in enumerate(sizes) if axis and not _same(a, b)]
    return differing[0] if len(differing) == 1 and not isinstance(past.shape[differing[0]], int) else None


def _same(a: ir.SymbolicDim | int, b: ir.SymbolicDim | int) -> bool:
    """Whether two sizes are the same number or the same name; sizes without a name differ from everything."""
    return str(a) == str(b) and not (isinstance(a, ir.SymbolicDim) and a.value is None)
