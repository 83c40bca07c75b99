"""Optimisation profiles: the shapes that an engine is built for, declared in the words of a decoder (batch, sequence, past).

An engine has one profile per way of being called. A decoder is called in two: a prompt of many tokens on an empty cache
(prefill), and one token on a full one (decode); one profile for both would make the builder tune for neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from ...graphs.decoder_state import is_past_name
from ...graphs.errors import GuardError
from ...graphs.plan import is_supervisor_input
from ...graphs.roles import TOKEN_TYPES, TOKENS, InputRoles, input_roles
from ...graphs.runtime_controls import PAST_GATE_INPUT
from ...runtime.decoder_inputs import PER_LAYER

# Smallest, typical and largest shape of one input.
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Span:
    """The sizes that one dimension may take: smallest, typical (what the builder tunes for), largest."""

    smallest: int
    typical: int
    largest: int

    def __post_init__(self) -> None:
        if not 0 <= self.smallest <= self.typical <= self.largest:
            raise GuardError(f"{self} is no range; write it as smallest:typical:largest, each at least the one before")

    def __str__(self) -> str:
        numbers = (self.smallest, self.typical, self.largest)
        return str(self.smallest) if len(set(numbers)) == 1 else ":".join(map(str, numbers))

    def __add__(self, other: Span) -> Span:
        return Span(self.smallest + other.smallest, self.typical + other.typical, self.largest + other.largest)

    @classmethod
    def parse(cls, text: str) -> Span:
        """`4` (always 4), `1:8` (tuned for 1) or `1:4:8`.

        Raises:
            GuardError: none of these.
        """
        if not re.fullmatch(r"[0-9]{1,9}(:[0-9]{1,9}){0,2}", text.strip()):
            raise GuardError(f"range {text!r} cannot be read; write it as 4, 1:8 or 1:4:8 (smallest:typical:largest)")
        numbers = [int(part) for part in text.split(":")]
        return cls(numbers[0], numbers[len(numbers) // 2] if len(numbers) == 3 else numbers[0], numbers[-1])


@dataclass(frozen=True)
class EngineProfile:
    """Shapes of one kind of decoder call.

    Attributes:
        name: for messages; engines number their profiles.
        batch: rows.
        sequence: tokens of one call.
        past: tokens in the KV cache before it.
    """

    name: str
    batch: Span
    sequence: Span
    past: Span

    @property
    def is_step(self) -> bool:
        """Whether each of its calls has one token per row."""
        return self.sequence.largest == 1

    @classmethod
    def parse(cls, text: str) -> EngineProfile:
        """`decode:batch=1:4,sequence=1,past=1:512:4096`; what is left out is 1 (`past`: 0).

        Raises:
            GuardError: it cannot be read.
        """
        name, colon, rest = text.partition(":")
        spans = {"batch": Span(1, 1, 1), "sequence": Span(1, 1, 1), "past": Span(0, 0, 0)}
        named: set[str] = set()
        for part in rest.split(",") if colon else ():
            key, equals, value = part.partition("=")
            if key.strip() not in spans or not equals:
                raise GuardError(
                    f"profile {text!r} cannot be read at {part!r}; write it as decode:batch=1:4,sequence=1,past=1:512:4096"
                )
            if key.strip() in named:
                raise GuardError(f"profile {text!r} gives {key.strip()} twice; give it once")
            named.add(key.strip())
            spans[key.strip()] = Span.parse(value)
        if not name or not colon:
            raise GuardError(f"profile {text!r} has no name; write it as prefill:batch=1:4,sequence=1:256:2048")
        return cls(name, **spans)

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "batch": str(self.batch), "sequence": str(self.sequence), "past": str(self.past)}


def default_profiles(limit: int | None, caches: bool, pairs: bool = False) -> tuple[EngineProfile, ...]:
    """Prefill of up to 2048 tokens and decode on up to 4096, up to 4 prompts; less where the model ends earlier.

    Args:
        limit: the model's longest sequence (`max_position_embeddings`), if known.
        caches: whether the decoder has a KV cache; without one each call is a prefill.
        pairs: whether each prompt takes two rows of the prefill (`graphs.pairs`).
    """
    longest = min(limit or 4096, 4096)
    batch = Span(1, 1, 4)
    prompt = min(longest, 2048)
    rows = Span(1, 2, 2 * batch.largest) if pairs else batch
    prefill = EngineProfile("prefill", rows, Span(1, min(256, prompt), prompt), Span(0, 0, 0))
    if not caches:
        return (replace(prefill, sequence=Span(1, min(256, longest), longest)),)
    past = max(longest - 1, 1)
    return prefill, EngineProfile("decode", batch, Span(1, 1, 1), Span(1, min(512, past), past))


def decoder_shapes(
    graph: ir.Graph,
    profile: EngineProfile,
    given: Mapping[str, Shapes],
    heads: tuple[int | None, int | None] = (None, None),
) -> dict[str, Shapes]:
    """The shapes of every input of a decoder in one profile.

    Args:
        graph: the decoder.
        profile: spans of batch, sequence and past.
        given: the user's shapes by input name; they take precedence.
        heads: number and size of the key/value heads, used where the graph leaves them open.

    Raises:
        GuardError: the profile is outside the graph's limits, or an input is unknown.
    """
    roles = input_roles(graph)
    return {
        name: given[name]
        if name in given
        else _shapes(value, _decoder_axes(value, roles, profile, heads), profile.name)
        for value in graph.inputs
        if (name := value.name or "") is not None
    }


def part_shapes(graph: ir.Graph, profiles: Sequence[EngineProfile], given: Mapping[str, Shapes]) -> dict[str, Shapes]:
    """The shapes of every input of the vision encoder or the embeddings: one profile that covers those of the decoder.

    Raises:
        GuardError: an input has open sizes that only the user can set.
    """
    batch, sequence = _hull([p.batch for p in profiles]), _hull([p.sequence for p in profiles])
    found = {}
    for value in graph.inputs:
        name = value.name or ""
        axes = {0: batch} if name == "pixel_values" else {0: batch, 1: sequence} if name == TOKENS else {}
        found[name] = given[name] if name in given else _shapes(value, axes, "the vision encoder's")
    return found


def _hull(spans: Sequence[Span]) -> Span:
    """The smallest range that holds all."""
    return Span(min(s.smallest for s in spans), max(s.typical for s in spans), max(s.largest for s in spans))


def _decoder_axes(
    value: ir.Value, roles: InputRoles, profile: EngineProfile, heads: tuple[int | None, int | None]
) -> dict[int, Span]:
    """Meaning of each axis of a decoder's input."""
    name, rank = value.name or "", len(value.shape or ())
    batch, sequence, total = profile.batch, profile.sequence, profile.past + profile.sequence
    pair = next((pair for pair in roles.states if pair.past == name), None)
    if pair is not None or is_past_name(name):
        grows = pair.axis if pair is not None else 2
        fixed = {}
        for axis, size in ((1, heads[0]), (3, heads[1])) if rank == 4 else ():
            # layers differ in their heads (Gemma 4): what the graph itself says of a layer counts
            if size is not None and not isinstance((value.shape or ())[axis], int):
                fixed[axis] = Span(size, size, size)
        return {0: batch, **fixed, **({} if grows is None else {grows: profile.past})}
    if name == roles.mask:
        return {0: batch, 1: total} if rank == 2 else {0: batch, rank - 2: sequence, rank - 1: total}
    if name == roles.positions:
        return {rank - 2: batch, rank - 1: sequence}
    if is_supervisor_input(name) or name == PAST_GATE_INPUT:
        return {0: batch}
    if name in {roles.tokens, roles.embeds, TOKEN_TYPES, PER_LAYER} or rank == 3:
        return {0: batch, 1: sequence}
    return {}


def _shapes(value: ir.Value, axes: Mapping[int, Span], profile: str) -> Shapes:
    """Smallest, typical and largest shape; a fixed size of the graph must lie in the profile's span."""
    spans = []
    for axis, size in enumerate(value.shape or ()):
        span = axes.get(axis)
        if isinstance(size, int):
            if span is not None and not span.smallest <= size <= span.largest:
                raise GuardError(
                    f"input {value.name!r} has size {size} on axis {axis}, profile {profile} has {span}; give a profile "
                    "that fits the graph, or export it with dynamic sizes"
                )
            spans.append(Span(size, size, size))
        elif span is None:
            raise GuardError(
                f"input {value.name!r} has an open size on axis {axis} that no profile covers; give its shapes with "
                f"--shape {value.name}=SMALLEST:TYPICAL:LARGEST, such as 1x3x224x224:1x3x448x448:4x3x448x448"
            )
        else:
            spans.append(span)
    return (
        tuple(s.smallest for s in spans),
        tuple(s.typical for s in spans),
        tuple(s.largest for s in spans),
    )


def require_within(profiles: Sequence[EngineProfile], limit: int | None) -> None:
    """A profile must not ask for sequences that the model was not made for.

    Raises:
        GuardError: it does; or there is none, or two have one name.
    """
    if not profiles or len({profile.name for profile in profiles}) != len(profiles):
        raise GuardError("two profiles share a name; give each --profile its own")
    for profile in profiles:
        longest = profile.past.largest + profile.sequence.largest
        if limit is not None and longest > limit:
            raise GuardError(
                f"profile {profile.name} reaches {longest} tokens, the model's config ends at {limit} "
                "(max_position_embeddings); ask for fewer"
            )


def parse_shapes(texts: Sequence[str]) -> dict[str, Shapes]:
    """`pixel_values=1x3x224x224:2x3x224x224:4x3x224x224`, or one shape for all three.

    Raises:
        GuardError: it cannot be read.
    """
    shapes: dict[str, Shapes] = {}
    for text in texts:
        name, equals, rest = text.rpartition("=")
        parts = [
            tuple(map(int, part.split("x")))
            for part in rest.split(":")
            if re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", part)
        ]
        if (
            not equals
            or len(parts) not in {1, 3}
            or len(parts) != len(rest.split(":"))
            or len(set(map(len, parts))) != 1
        ):
            raise GuardError(f"shape {text!r} cannot be read; write it as pixel_values=1x3x224x224, or three with ':'")
        if name in shapes:
            raise GuardError(f"shape {text!r} is the second for {name}; give one --shape for each input")
        shapes[name] = (parts[0], parts[len(parts) // 2], parts[-1])
    return shapes


def shapes_to_json(shapes: Mapping[str, Shapes]) -> dict[str, Any]:
    return {name: [list(shape) for shape in three] for name, three in shapes.items()}
