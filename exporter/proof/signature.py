"""Proof inputs made from a graph's own signature, for graphs that take more than a prompt, or calls of one size only.

Sizes come from the graph: fixed sizes are kept, sizes with the name of the batch or length follow these, and other named sizes
are tried. Values are seeded: zeros or ones first, then random ones, because the guard must hold whatever such an input does.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...graphs.decoder_state import size
from ...graphs.dtypes import PORT_DTYPES
from ...graphs.errors import GuardError
from ...graphs.package import ModelPackage
from ...graphs.roles import InputRoles, input_roles
from ...runtime.decoder import DecoderSession
from ...runtime.decoder_inputs import PER_LAYER, PromptBatch, needs_more

BATCH, LENGTH, STEPS_KEPT = 2, 12, 4
_TRIED = (3, 1, 2, 4, LENGTH, 8, 16)  # sizes for unknown axes; M-RoPE's three axes first
_MOST_TRIES = 60


class InputsUnknown(GuardError):
    """A graph runs on none of the inputs that could be made for it.

    Attributes:
        reason: what it lacks, a clause without the file and without advice.
    """

    def __init__(self, decoder: Path, reason: str) -> None:
        super().__init__(f"{decoder}: {reason}; give inputs that it runs on with --proof-inputs")
        self.reason = reason


VARIANTS = ("plain values", "random values", "other random values")


def why_made(graph: ir.Graph, has_embeddings: bool = False) -> str:
    """Why no prompt can be put into a graph as it comes; "" where one can.

    Args:
        has_embeddings: whether an embedding graph stands beside it, which gives the embeddings for each layer too.
    """
    roles = input_roles(graph)
    embedded = (PER_LAYER,) if has_embeddings else ()
    unknown = needs_more([str(v.name) for v in _fed(graph)], roles, embedded)
    if unknown:
        return f"the graph takes {unknown[0]!r}, which no prompt fills"
    text = _named(graph, roles.text)
    sizes = [size(dim) for dim in text.shape or ()] if text is not None else []
    if sizes and isinstance(sizes[0], int):
        return f"the graph takes batches of {sizes[0]} alone"
    if len(sizes) > 1 and isinstance(sizes[1], int) and sizes[1] > 1:
        return f"the graph takes {sizes[1]} tokens a call"
    mask = _named(graph, roles.mask)
    if mask is not None and mask.shape is not None and isinstance(size(mask.shape[-1]), int):
        return f"the graph takes a mask of {size(mask.shape[-1])} columns"
    if _open_positions(graph, roles) is not None:
        return f"the number of rows of {roles.positions!r} is unknown"
    return ""


def _open_positions(graph: ir.Graph, roles: InputRoles) -> ir.Value | None:
    """The input `[axes, batch, sequence]` that numbers the tokens, where the graph leaves open how many axes there are."""
    positions = _named(graph, roles.positions)
    if positions is None or positions.shape is None or len(positions.shape) != 3:
        return None
    return None if isinstance(size(positions.shape[0]), int) else positions


@dataclass(frozen=True)
class SeededInputs:
    """Values for inputs without a role, the same whenever the same tokens come (`runtime.decoder.FurtherInputs`).

    Attributes:
        values: the inputs.
        sizes: sizes of named axes: those of the batch, of axes that were tried.
        sequence, total, past: names of the axes that follow the tokens.
        variant: 0 for zeros, ones and counts, else the seed of random numbers.
    """

    values: tuple[ir.Value, ...]
    sizes: Mapping[str, int]
    sequence: frozenset[str] = frozenset()
    total: frozenset[str] = frozenset()
    past: frozenset[str] = frozenset()
    variant: int = 0

    def between(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """All inputs of a call with tokens `start` to `stop`."""
        return {str(value.name): self._array(value, start, stop) for value in self.values}

    def _array(self, value: ir.Value, start: int, stop: int) -> np.ndarray:
        name, dtype = str(value.name), PORT_DTYPES[value.dtype or ir.DataType.FLOAT]
        dims = [size(dim) for dim in value.shape or ()]
        shape = tuple(self._size(dim, start, stop) for dim in dims)
        kind = np.dtype(dtype).kind
        counted = kind == "i" and any(dim in self.sequence for dim in dims) and "position" in name
        if counted:
            return np.broadcast_to(np.arange(start, stop, dtype=dtype), shape).copy()
        if kind == "i" and np.prod(shape) == 1 and ("past" in name or "total" in name):
            return np.full(shape, start if "past" in name else stop, dtype)
        if self.variant == 0:
            return np.full(shape, 1 if "mask" in name else 0, dtype)
        random = np.random.default_rng([self.variant, zlib.crc32(name.encode()), stop])
        if kind in "iub":
            return random.integers(0, 2, shape).astype(dtype)
        return random.normal(0, 0.5, shape).astype(dtype)

    def _size(self, dim: int | str | None, start: int, stop: int) -> int:
        if isinstance(dim, int):
            return dim
        name = str(dim)
        if name in self.sequence:
            return stop - start
        return stop if name in self.total else start if name in self.past else self.sizes[name]


@dataclass(frozen=True)
class Signature:
    """Calls of a graph, read from its inputs.

    Attributes:
        batch, length: of the prompt, as fixed by the graph or chosen.
        roles: of the inputs.
        unknown: inputs without a role.
        named: axis name -> what it follows: `batch`, `sequence`, `total`, `past`.
        open: names of axes of unknown size.
    """

    batch: int
    length: int
    roles: InputRoles
    unknown: tuple[ir.Value, ...]
    named: Mapping[str, str] = field(default_factory=dict)
    open: tuple[str, ...] = ()

    def inputs(self, tried: Mapping[str, int], variant: int) -> SeededInputs:
        groups = {
            what: frozenset(n for n, of in self.named.items() if of == what) for what in ("sequence", "total", "past")
        }
        sizes = {name: self.batch for name, of in self.named.items() if of == "batch"}
        return SeededInputs(self.unknown, sizes | dict(tried), **groups, variant=variant)


def read_signature(graph: ir.Graph) -> Signature:
    """The sizes of a graph's calls, from its inputs."""
    roles = input_roles(graph)
    unknown = needs_more([str(v.name) for v in _fed(graph)], roles)
    text, positions = _named(graph, roles.text), _open_positions(graph, roles)
    sizes = [size(dim) for dim in text.shape or ()] if text is not None else []
    batch = sizes[0] if sizes and isinstance(sizes[0], int) else BATCH
    length = sizes[1] if len(sizes) > 1 and isinstance(sizes[1], int) else min(LENGTH, _room(graph, roles))
    named: dict[str, str] = {}
    for pair in roles.states:
        if pair.axis is not None and (past := _named(graph, pair.past)) is not None and past.shape is not None:
            named[str(size(past.shape[pair.axis]))] = "past"
    mask = _named(graph, roles.mask)
    if mask is not None and mask.shape is not None:
        named[str(size(mask.shape[-1]))] = "total"
    for dim, what in zip(sizes[:2], ("batch", "sequence"), strict=False):
        named[str(dim)] = what
    made = [value for name in unknown if (value := _named(graph, name)) is not None]
    if positions is not None and positions.shape is not None:
        made.append(positions)
        named |= {str(size(positions.shape[1])): "batch", str(size(positions.shape[2])): "sequence"}
    every = dict.fromkeys(
        str(size(dim)) for value in made for dim in value.shape or () if not isinstance(size(dim), int)
    )
    for value in made:
        dims = [size(dim) for dim in value.shape or ()]
        if dims and not isinstance(dims[0], int) and value is not positions and str(dims[0]) not in named:
            named[str(dims[0])] = "batch"
    return Signature(batch, length, roles, tuple(made), named, tuple(name for name in every if name not in named))


def made_batches(
    session: DecoderSession, package: ModelPackage, width: int, vocabulary: int, pads: bool
) -> list[PromptBatch]:
    """Batches that the graph runs on: one, or one for each kind of values of its further inputs.

    Args:
        session: the decoder.
        package: the model.
        width: of its embeddings.
        vocabulary: number of tokens.
        pads: whether rows may have padding.

    Raises:
        InputsUnknown: it runs on none of those tried; names the input.
    """
    signature = read_signature(package.load_decoder().graph)
    random = np.random.default_rng(0)
    shape = signature.batch, signature.length
    ids = random.integers(0, vocabulary, shape)
    mask = np.ones_like(ids)
    if pads and signature.batch > 1 and signature.length > 3:
        mask[0, :3] = 0
    embeds = random.normal(0, 0.5, (*shape, width)).astype(np.float32) if session.takes_embeds else None
    failure: GuardError | None = None
    for tried in _assignments(signature.open):
        batches = []
        for variant in range(len(VARIANTS) if signature.unknown else 1):
            further = signature.inputs(tried, variant) if signature.unknown else None
            batch = PromptBatch(ids, mask, embeds, further=further)
            try:
                outputs, _ = session.prefill(batch)
            except GuardError as error:  # the runtime fails, or a size of its cache is nowhere to be found
                failure = failure or error
                continue
            if all(np.isfinite(np.asarray(outputs[session.logits_output], np.float32)).ravel()) or not batches:
                batches.append(batch)
        if batches:
            return batches
    raise InputsUnknown(package.decoder, _reason(signature, failure))


def _assignments(names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Sizes to try for axes of unknown size."""
    for sizes in islice(product(_TRIED, repeat=len(names)), _MOST_TRIES):
        yield dict(zip(names, sizes, strict=True))


def _reason(signature: Signature, failure: GuardError | None) -> str:
    what = "; ".join(
        f"{value.name!r} ({value.dtype.name.lower() if value.dtype else 'unknown type'} {_shape(value)})"
        for value in signature.unknown
    )
    taken = f"no values could be made for its inputs {what}" if what else "it runs on no inputs that could be made"
    return f"{taken} ({failure})"


def _shape(value: ir.Value) -> str:
    return "[" + ", ".join(str(size(dim)) for dim in value.shape or ()) + "]"


def _room(graph: ir.Graph, roles: InputRoles) -> int:
    """Number of tokens of a prompt that fit into caches and masks of fixed size, with room for decode steps."""
    fixed = []
    mask = _named(graph, roles.mask)
    if mask is not None and mask.shape is not None:
        fixed.append(size(mask.shape[-1]))
    for pair in roles.states:
        past = _named(graph, pair.past)
        if past is not None and past.shape is not None and len(past.shape) == 4 and pair.axis is None:
            fixed.append(size(past.shape[2]))
    return max(min((n - STEPS_KEPT for n in fixed if isinstance(n, int)), default=LENGTH), 1)


def _fed(graph: ir.Graph) -> list[ir.Value]:
    return [value for value in graph.inputs if value.name not in graph.initializers]


def _named(graph: ir.Graph, name: str) -> ir.Value | None:
    return next((value for value in graph.inputs if name and value.name == name), None)
