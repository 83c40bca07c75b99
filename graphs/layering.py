"""Finds the layers among the vertices of the dominator chain, and the output of each layer.

A gap of the chain with a mixer in it begins a layer; the layer's last sum is the last one before the next such gap. Four
kinds of decoder need more than that:

- Cross attention. Its values come from an encoder and not from the stream. In BART's kind it stands between a layer's
  self-attention and its MLP, with a sum of its own, and begins no layer; in Mllama's kind it is a layer, with an MLP behind it.
  The config's count decides, and without one the MLPs do: a self-attention with one sum alone before the next attention
  has its MLP behind the cross attention.
- A convolution inside the MLP (Inkling): two gaps with one sum each, and the config's count decides.
- One block, one mixer (Nemotron-H): every sum is a layer's, that of an MLP without attention too. The config lists them.
- A norm behind the sum (post-norm: BART, OPT-350m), or a Reshape (OPT's sums are `[batch * sequence, width]`): the next layer
  and its residual read what comes out there, and that is Hugging Face's `hidden_states[l + 1]`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

from .dataflow import Flow, Vertex, is_skip_norm
from .errors import AnatomyNotFound
from .layer_count import LayerCount
from .mixers import is_attention, is_cross_attention, is_mixer, is_sum_of, operands

_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "ReduceMean", "ReduceL2"})
# What leaves a state as it is, or changes how it is written down alone.
_CARRIERS = frozenset(
    {"Cast", "CastLike", "Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
    | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
)
_Gap = tuple[Vertex, Vertex]  # its start, and the last sum behind it
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer on the dominator chain.

    Attributes:
        start: the last vertex of the chain before its first mixer.
        total: its last sum.
        output: what the next layer reads: the sum, or what is made of it alone (a norm, a Reshape).
    """

    start: Vertex
    total: Vertex
    output: Vertex


class Chain:
    """The dominator chain from a source to a sink.

    Args:
        flow: of one body.
        source, sink: where the stream begins and ends.
    """

    def __init__(self, flow: Flow, source: Vertex, sink: Vertex) -> None:
        self._flow, self._source, self.sink = flow, source, sink
        self._inside = flow.between(source, sink)
        self._members = frozenset(self._inside)
        self._vertices = flow.dominator_chain(source, sink)
        self._indices = [vertex.index for vertex in self._vertices]
        self._at = {index: place for place, index in enumerate(self._indices)}

    def gaps(self) -> list[_Gap]:
        """`(start, last sum)` of every gap with a mixer in it and a sum behind it."""
        return self._split(self._mixers())

    def join_count(self) -> int:
        """Number of sums on every path whose two summands are computed from the source."""
        count = 0
        for vertex in self._sums(0, len(self._vertices)):
            assert vertex.node is not None
            summands = [self._flow.vertex(value) for value in operands(vertex.node)]
            count += all(summand is not None and summand.index in self._members for summand in summands)
        return count

    def kinds(self) -> str:
        """The kinds of the gaps' mixers as a clause for a message, if some have no attention; else empty."""
        gaps = len(self.gaps())
        with_attention = len(self._split([mixer for mixer in self._mixers() if is_attention(self._flow, mixer)]))
        others = sorted({mixer.op_type for mixer in self._mixers() if not is_attention(self._flow, mixer)})
        if with_attention == gaps:
            return ""
        return f"; {with_attention} with attention, {gaps - with_attention} with {' and '.join(others)} alone"

    def layers(self, declared: LayerCount | None) -> list[Layer]:
        """The decoder's layers.

        Raises:
            AnatomyNotFound: the chain does not show what the config declares, or cannot be read without a config.
        """
        if declared is not None and declared.mixers is not None:
            return [Layer(total, total, total) for total in self._blocks(declared.mixers)]
        gaps = self._layer_gaps(declared)
        return self._with_outputs(gaps)

    # Layers

    def _layer_gaps(self, declared: LayerCount | None) -> list[_Gap]:
        every = self.gaps()
        stream = self._flow.reached_from(self._source)
        mixers = self._mixers()
        halves = self._halves(every, mixers)
        if halves is not None and declared is None:
            raise AnatomyNotFound(
                "every attention has one residual sum alone, and behind it a convolution or recurrence has one, so whether the "
                "two are one layer is not plain from the graph; put the model's config.json beside it"
            )
        if halves is not None and declared is not None and len(halves) == declared.count:
            return halves
        own = [mixer for mixer in mixers if not is_cross_attention(self._flow, mixer, stream)]
        if len(own) == len(mixers):
            return every
        merged = self._split(own)
        if len(merged) == len(every):  # cross attention beside self-attention, in the same gap
            return every
        found = self._plausible(every, merged)
        if declared is not None:
            found = [gaps for gaps in found if len(gaps) == declared.count]
        if len(found) == 1:
            return found[0]
        if declared is None:
            raise AnatomyNotFound(
                "the decoder has cross attention, and whether that is a layer or a part of one is not plain from the graph; "
                "put the model's config.json beside it"
            )
        raise AnatomyNotFound(
            f"the config declares {declared.count} layers, the graph's residual stream shows {len(merged)} with self-attention "
            f"and {len(every) - len(merged)} with cross attention alone; check that config.json belongs to this graph"
        )

    def _halves(self, every: list[_Gap], mixers: list[Vertex]) -> list[_Gap] | None:
        """The attentions' gaps, where each ends in one sum and is followed by a gap of another mixer with one sum: that of an
        MLP with a convolution in it. `None`: the gaps are otherwise."""
        merged = self._split([mixer for mixer in mixers if is_attention(self._flow, mixer)])
        if 2 * len(merged) != len(every) or {self._sums_of(gap) for gap in every} != {1}:
            return None
        return merged if [start for start, _ in merged] == [start for start, _ in every[::2]] else None

    def _plausible(self, every: list[_Gap], merged: list[_Gap]) -> list[list[_Gap]]:
        """The readings that the sums allow: a layer that ends before cross attention begins has the sum of an MLP."""
        starts = {start.index for start, _ in merged}
        before = {self._sums_of(gap) for gap, following in pairwise(every) if following[0].index not in starts}
        cross = {self._sums_of(gap) for gap in every if gap[0].index not in starts}
        if before == {1} and 1 not in cross:
            return [merged]
        if 1 not in before | cross:
            return [every]
        return [every, merged]

    def _sums_of(self, gap: _Gap) -> int:
        start, total = gap
        return len(self._sums(self._at[start.index] + 1, self._at[total.index] + 1))

    def _blocks(self, mixers: tuple[bool, ...]) -> list[Vertex]:
        """The sum of every block, where each has one."""
        sums = self._sums(0, len(self._vertices))
        places = [mixer.index for mixer in self._mixers()]
        bounds = [self._source.index, *(total.index for total in sums)]
        found = tuple(any(low < place < high for place in places) for low, high in pairwise(bounds))
        if found != mixers:
            raise AnatomyNotFound(
                f"the config lists {len(mixers)} blocks of one mixer each ({_spelled(mixers)}), the graph's residual stream "
                f"shows {len(found)} sums ({_spelled(found)}); check that config.json belongs to this graph"
            )
        return sums

    # Outputs

    def _with_outputs(self, gaps: list[_Gap]) -> list[Layer]:
        ends = [self._tail(total, following[0]) for (_, total), following in pairwise(gaps)]
        if not any(ends):
            return [Layer(start, total, total) for start, total in gaps]
        if len(set(ends)) > 1:
            raise AnatomyNotFound(
                "some layers end in a norm behind their last sum and others do not, so where a layer's state leaves it is not "
                "plain; such decoders cannot be guarded"
            )
        tail = ends[0]
        self._require_plain_post_norm(gaps)
        layers = []
        for number, (start, total) in enumerate(gaps):
            place = self._at[total.index] + len(tail)
            found = tuple(vertex.op_type for vertex in self._vertices[self._at[total.index] + 1 : place + 1])
            if found != tail:
                raise AnatomyNotFound(
                    f"layer {number} does not end as the others do, in {' '.join(tail)} behind its last sum "
                    f"{total.name!r}; such decoders cannot be guarded"
                )
            layers.append(Layer(start, total, self._vertices[place]))
        return layers

    def _tail(self, total: Vertex, following: Vertex) -> tuple[str, ...]:
        """The operators of the chain between a layer's last sum and the next layer, where these change the state or its axes
        and read nothing else; else empty."""
        if following.index <= total.index:
            return ()
        inside = set(self._flow.between(total, following)) - {total.index}
        closed = all(
            before in inside or before == total.index for at in inside for before in self._flow.predecessors[at]
        )
        steps = [self._flow.vertices[at] for at in inside]
        if not closed or all(step.op_type in _CARRIERS - _RESHAPES for step in steps):
            return ()
        if all(step.op_type in _CARRIERS for step in steps) and not _is_flat(total):
            return ()
        return tuple(step.op_type for step in self._vertices[self._at[total.index] + 1 : self._at[following.index] + 1])

    def _require_plain_post_norm(self, gaps: list[_Gap]) -> None:
        """A norm before layer 0 too: then the norms may stand before layers (BLOOM's residual behind the norm), not behind."""
        if len(gaps) != len(self.gaps()):  # an encoder-decoder of BART's kind: it has a norm behind the embedding
            return
        (first, total), (following, _) = gaps[:2]
        if self._has_norm(self._source, first) and self._has_norm(total, following):
            raise AnatomyNotFound(
                "a norm stands before the first layer and one behind every layer's last sum, so whether a layer's state leaves "
                "it before or behind the norm is not plain; such decoders cannot be guarded"
            )

    def _has_norm(self, first: Vertex, last: Vertex) -> bool:
        steps = (self._flow.vertices[at] for at in self._flow.between(first, last) if at > first.index)
        return any(step.op_type in _NORMS or (is_skip_norm(step.node) and not step.is_sum) for step in steps)

    # The chain

    def _mixers(self) -> list[Vertex]:
        return [v for v in (self._flow.vertices[i] for i in self._inside) if is_mixer(self._flow, v)]

    def _split(self, mixers: list[Vertex]) -> list[_Gap]:
        """`(start, last sum)` of the gaps that these mixers lie in."""
        if len(self._vertices) < 2:
            return []
        starts = sorted({place for place in map(self._before, mixers) if place is not None})
        found = []
        for start, stop in pairwise([*starts, len(self._vertices) - 1]):
            sums = self._sums(start + 1, stop + 1)
            if sums:
                found.append((self._vertices[start], sums[-1]))
        return found

    def _before(self, mixer: Vertex) -> int | None:
        """Place in the chain of the last vertex before the mixer."""
        place = bisect_left(self._indices, mixer.index) - 1
        return place if place >= 0 else None

    def _sums(self, first: int, stop: int) -> list[Vertex]:
        """The residual sums among the chain's vertices `first` to `stop`, the last left out."""
        return [v for v in self._vertices[first:stop] if is_sum_of(self._flow, v, self._members)]


def _is_flat(total: Vertex) -> bool:
    """Whether a sum is known to have the batch and the sequence on one axis."""
    return total.value is not None and total.value.shape is not None and len(total.value.shape) == 2


def _spelled(mixers: tuple[bool, ...]) -> str:
    return " ".join("mixer" if mixes else "MLP" for mixes in mixers)
