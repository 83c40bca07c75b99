"""The last attended token of each row: in the graph, in numpy, and as a plain reading of every exporter's convention.

The oracle knows what the graph does not: which tokens were fed, where each row's padding is, how many are past. It lays a
conversation out on a tape, one column per token or padding, and feeds it call by call the way that some app does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import directions, run, text_model
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmguard.graphs import reference
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.call_inputs import CallInputs, call_inputs, mask_input
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.node_builder import NodeBuilder
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.positions import LastToken
from vlmguard.graphs.spec import GuardSpec

pytest.importorskip("onnxruntime")

WIDTH = 3


def probe(
    mask: str | None = "int64[B, T]", cache: bool = False, positions: str | None = None, opset: int = 18
) -> ir.Model:
    """A graph that shows what `LastToken` makes of a stream `x` and of what else goes in."""
    inputs, outputs, nodes = ["float[B, S, 3] x"], ["float[B, S, 3] y"], ["y = Identity(x)"]
    if mask is not None:
        inputs.append(f"{mask} attention_mask")
    if positions is not None:
        inputs.append(f"{positions} position_ids")
    if cache:
        inputs.append("float[B, 2, P, 4] past")
        outputs.append("float[B, 2, P_and_S, 4] present")
        nodes.append("present = Concat <axis = 2> (past, past)")
    header = f'<ir_version: 9, opset_import: ["" : {opset}]>\n'
    model = text_model(f"{header}g ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {' '.join(nodes)} }}")
    builder = NodeBuilder(model.graph, "probe")
    last = LastToken(builder, model.graph.inputs[0], call_inputs(model.graph))
    shown = ((last.pairs, ir.DataType.INT64), (last.selected, ir.DataType.BOOL))
    builder.place_last()
    for value, dtype in shown:
        value.dtype = dtype
        model.graph.outputs.append(value)
    return model


PLAIN, CACHED = probe(), probe(cache=True)
POSITIONED, BOTH = probe(positions="int64[B, S]"), probe(cache=True, positions="int64[B, S]")


@dataclass(frozen=True)
class Call:
    """One call of a decoder, and what only the app knows.

    Attributes:
        mask: as it is fed.
        length: tokens of this call.
        past: length of the past axis of the cache that is fed.
        positions: as they are fed.
        last: `[batch]`: each row's last token in this call, or the last index where it has none.
    """

    mask: np.ndarray
    length: int
    past: int
    positions: np.ndarray
    last: list[int]


def probed(call: Call, cache: bool = True, positions: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """`(index that is read, selection)` of a call, in the graph; and the reference says the same."""
    batch = len(call.mask)
    feeds = {"x": np.zeros((batch, call.length, WIDTH), np.float32), "attention_mask": call.mask}
    if cache:
        feeds["past"] = np.zeros((batch, 2, call.past, 4), np.float32)
    if positions:
        feeds["position_ids"] = call.positions
    model = (BOTH if positions else CACHED) if cache else (POSITIONED if positions else PLAIN)
    shown = run(model, feeds)
    pairs, selected = shown["vlmguard/probe/pairs"], shown["vlmguard/probe/selected"]
    np.testing.assert_array_equal(pairs[:, 0], np.arange(batch))
    said = call.mask, call.length, call.past if cache else 0, call.positions if positions else None
    np.testing.assert_array_equal(selected.astype(np.float32), reference.last_token(*said))
    np.testing.assert_array_equal(pairs[:, 1], reference.last_index(*said))
    return pairs[:, 1], selected[..., 0]


# The oracle

Convention = Literal["compact", "static"]
Cache = Literal["grows", "buffer"]
Positions = Literal["count", "count from 1", "padding is 1", "index"]


def calls(
    tape: np.ndarray, lengths: list[int], mask: Convention, cache: Cache, spare: int, kind: Positions
) -> Iterator[Call]:
    """A tape `[batch, columns]` of tokens (1) and padding (0), fed in calls of these lengths.

    Args:
        tape: all columns.
        lengths: of the calls; they add up to the columns.
        mask: `compact`: as long as the tokens so far. `static`: as long as the longest answer, zeros behind.
        cache: `grows`, or a `buffer` of the mask's full length from the start.
        spare: columns of a static mask that no token reaches.
        kind: `count`: tokens before this one, as transformers counts. `count from 1`: one more, as PaliGemma does.
            `padding is 1`: counted, and 1 for padding, as older transformers wrote. `index`: the column.
    """
    counted = np.maximum(np.cumsum(tape, axis=1) - 1, 0)
    positions = {
        "count": counted,
        "count from 1": counted + 1,
        "padding is 1": np.where(tape, counted, 1),
        "index": np.broadcast_to(np.arange(tape.shape[1]), tape.shape),
    }[kind]
    capacity, past = tape.shape[1] + spare, 0
    for length in lengths:
        stop = past + length
        seen = tape[:, :stop]
        fed = seen if mask == "compact" else np.pad(seen, ((0, 0), (0, capacity - stop)))
        own = [[at for at, real in enumerate(row) if real] for row in tape[:, past:stop]]
        last = [row[-1] if row else length - 1 for row in own]
        yield Call(fed, length, past if cache == "grows" else capacity, positions[:, past:stop], last)
        past = stop


def lengths_of(columns: int) -> st.SearchStrategy[list[int]]:
    """Ways to cut columns into calls: prefill in one or in parts, then tokens one by one."""
    cuts = st.sets(st.integers(1, max(columns - 1, 1)), max_size=4)
    return cuts.map(lambda chosen: np.diff([0, *sorted(chosen - {columns}), columns]).tolist())


@st.composite
def tapes(draw: st.DrawFn, padding: str) -> tuple[np.ndarray, list[int]]:
    """A tape and its calls. `any`: tokens wherever. `left`: padding in front of rows. `right`: behind rows, one has none."""
    batch, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    if padding == "any":
        cells = st.lists(st.integers(0, 1), min_size=columns, max_size=columns)
        tape = np.array(draw(st.lists(cells, min_size=batch, max_size=batch)))
    else:
        sizes = draw(st.lists(st.integers(1, columns), min_size=batch, max_size=batch))
        sizes[draw(st.integers(0, batch - 1))] = columns
        tape = np.array([[1] * size + [0] * (columns - size) for size in sizes])
        if padding == "left":
            tape = tape[:, ::-1].copy()
    return tape, draw(lengths_of(columns))


KINDS = st.sampled_from(["count", "count from 1", "padding is 1", "index"])


@given(tapes("any"), KINDS, st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_mask_of_past_and_present(drawn: tuple[np.ndarray, list[int]], kind: Positions, positions: bool) -> None:
    """With a cache that grows: whatever the padding, whatever positions say, the last token and it alone."""
    for call in calls(*drawn, "compact", "grows", 0, kind):
        read, selected = probed(call, positions=positions)
        assert read.tolist() == call.last
        assert [np.flatnonzero(row).tolist() for row in selected] == [[place] for place in call.last]


@given(tapes("any"), KINDS, st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_graph_without_a_cache(drawn: tuple[np.ndarray, list[int]], kind: Positions, positions: bool) -> None:
    """Each call has the whole sequence again, and the mask as many columns."""
    tape, _ = drawn
    (call,) = calls(tape, [tape.shape[1]], "compact", "grows", 0, kind)
    read, selected = probed(call, cache=False, positions=positions)
    assert read.tolist() == call.last
    assert [np.flatnonzero(row).tolist() for row in selected] == [[place] for place in call.last]


CACHES = st.sampled_from(["grows", "buffer"])


@given(tapes("left"), st.integers(0, 12), CACHES, st.sampled_from(["count", "index"]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_static_mask_with_padding_on_the_left(
    drawn: tuple[np.ndarray, list[int]], spare: int, cache: Cache, kind: Positions, positions: bool
) -> None:
    """Prefill, chunked prefill and decode: the last token and it alone."""
    for call in calls(*drawn, "static", cache, spare, kind):
        read, selected = probed(call, positions=positions)
        assert read.tolist() == call.last
        assert [np.flatnonzero(row).tolist() for row in selected] == [[place] for place in call.last]


@given(tapes("right"), st.integers(0, 12), CACHES, st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_static_mask_with_padding_on_the_right(
    drawn: tuple[np.ndarray, list[int]], spare: int, cache: Cache, positions: bool
) -> None:
    for call in calls(*drawn, "static", cache, spare, "index"):
        read, selected = probed(call, positions=positions)
        assert read.tolist() == call.last
        assert [np.flatnonzero(row).tolist() for row in selected] == [[place] for place in call.last]


@given(
    tapes("any"),
    st.integers(0, 12),
    st.sampled_from(["compact", "static"]),
    CACHES,
    st.sampled_from(["count", "index"]),
)
@settings(max_examples=150, deadline=None)
def test_with_a_second_witness_no_token_at_the_end_is_missed(
    drawn: tuple[np.ndarray, list[int]], spare: int, mask: Convention, cache: Cache, kind: Positions
) -> None:
    """Any padding, a later part of the prompt padded on the right in every row included: where the first row has begun, its
    last token is among those that are edited, and it is the one that is read."""
    tape, lengths = drawn
    tape = tape.copy()
    tape[:, 0] = 1  # a row that begins with padding counts less: then the mask alone decides
    if kind == "count":
        tape[0] = np.sort(tape[0])[::-1]
        tape[:] = tape[0]
    past = 0
    for call in calls(tape, lengths, mask, cache, spare, kind):
        read, selected = probed(call, positions=True)
        for row, place in enumerate(call.last):
            if tape[row, past : past + call.length].any():
                assert selected[row, place]
                assert read[row] == place
        past += call.length


@given(tapes("left"), st.integers(0, 12), CACHES, st.sampled_from(["count from 1", "padding is 1"]))
@settings(max_examples=60, deadline=None)
def test_positions_that_are_no_count_add_a_place_and_take_none_away(
    drawn: tuple[np.ndarray, list[int]], spare: int, cache: Cache, kind: Positions
) -> None:
    """Static mask: the last token is edited in any case, and at most the one before it besides."""
    for call in calls(*drawn, "static", cache, spare, kind):
        _, selected = probed(call, positions=True)
        for row, place in enumerate(call.last):
            assert selected[row, place]
            assert set(np.flatnonzero(selected[row])) <= {place - 1, place}


# Single cases


@pytest.mark.parametrize("columns", [12, 13, 16, 20, 23, 24, 30])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_a_static_mask_of_any_width_means_the_prompts_last_token(columns: int, positions: bool, cache: bool) -> None:
    """12 tokens, as graph capture feeds them: 16, 20 and 23 columns once meant tokens 7, 3 and 0."""
    mask = np.zeros((1, columns), np.int64)
    mask[:, :12] = 1
    call = Call(mask, 12, columns if columns > 12 else 0, np.arange(12)[None], [11])
    read, selected = probed(call, cache, positions)
    assert read.tolist() == [11]
    assert np.flatnonzero(selected).tolist() == [11]


def test_what_a_static_mask_cannot_show() -> None:
    """The last part of a prompt (past 4, tokens 2, padding 2) behind a static mask: by itself it looks like the end of a call
    at index 3, and with positions the true place is edited and read too."""
    mask = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0, 0]])
    call = Call(mask, 4, 10, np.array([[4, 5, 6, 7]]), [1])
    read, selected = probed(call)
    assert (read.tolist(), selected.tolist()) == ([3], [[False, False, False, True]])
    read, selected = probed(call, positions=True)
    assert (read.tolist(), selected.tolist()) == ([1], [[False, True, False, True]])


@pytest.mark.parametrize(
    ("mask", "places"),
    [
        ([[1, 1, 1], [0, 0, 1]], [2, 2]),  # left padding
        ([[1, 1, 1], [1, 0, 0]], [2, 0]),  # right padding
        ([[1, 1, 0], [1, 0, 0]], [1, 0]),  # in all rows
        ([[1, 0, 1], [0, 1, 0]], [2, 1]),
        ([[7, -2, 0], [0, 5, 0]], [1, 1]),  # any number but 0 attends
        ([[0, 0, 0], [1, 1, 0]], [2, 1]),  # a row without a token
        ([[1], [1]], [2, 2]),  # one column for all
    ],
)
def test_the_last_attended_token(mask: list[list[int]], places: list[int]) -> None:
    read, selected = probed(Call(np.array(mask), 3, 0, np.zeros((2, 3), np.int64), places), cache=False)
    assert read.tolist() == places
    assert [np.flatnonzero(row).tolist() for row in selected] == [[place] for place in places]


@pytest.mark.parametrize(("onnx_type", "dtype"), [("int32", np.int32), ("bool", np.bool_), ("float", np.float32)])
def test_masks_of_other_dtypes(onnx_type: str, dtype: type) -> None:
    mask = np.array([[1, 0, 0], [1, 1, 0]]).astype(dtype)
    shown = run(probe(f"{onnx_type}[B, T]"), {"x": np.zeros((2, 3, WIDTH), np.float32), "attention_mask": mask})
    assert shown["vlmguard/probe/pairs"].tolist() == [[0, 0], [1, 1]]
    assert shown["vlmguard/probe/selected"][..., 0].tolist() == [[True, False, False], [False, True, False]]


def test_a_fraction_attends_too() -> None:
    mask = np.array([[1.0, 0.25, 0.0]], np.float32)
    shown = run(probe("float[B, T]"), {"x": np.zeros((1, 3, WIDTH), np.float32), "attention_mask": mask})
    assert shown["vlmguard/probe/pairs"].tolist() == [[0, 1]]


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_every_opset_that_is_taken(opset: int) -> None:
    """ReduceMax takes its axes as an attribute before opset 18, and as an input from then on; positions may be int32."""
    model = probe(cache=True, positions="int32[B, S]", opset=opset)
    feeds = {
        "x": np.zeros((2, 3, WIDTH), np.float32),
        "attention_mask": np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
        "position_ids": np.array([[2, 3, 4], [2, 3, 4]], np.int32),
        "past": np.zeros((2, 2, 2, 4), np.float32),
    }
    assert run(model, feeds)["vlmguard/probe/pairs"].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 1), (2, 4)])
def test_without_a_mask_the_last_index_is_the_last_token(batch: int, sequence: int) -> None:
    shown = run(probe(None), {"x": np.zeros((batch, sequence, WIDTH), np.float32)})
    assert shown["vlmguard/probe/pairs"].tolist() == [[row, sequence - 1] for row in range(batch)]
    assert shown["vlmguard/probe/selected"][..., 0].tolist() == [[False] * (sequence - 1) + [True]] * batch


def test_each_witness_costs_a_few_nodes_per_graph() -> None:
    """A mask alone, a cache that grows besides, positions besides."""
    nodes = [
        sum((node.name or "").startswith("vlmguard/") for node in model.graph)
        for model in (PLAIN, CACHED, POSITIONED, BOTH)
    ]
    assert nodes == [PLAIN_NODES, PLAIN_NODES + 7, PLAIN_NODES + 10, PLAIN_NODES + 17]


PLAIN_NODES = 28


# What is found among the inputs


def found(inputs: str, outputs: str = "float[B, S, 3] y", nodes: str = "") -> CallInputs:
    return call_inputs(text_model(f"g ({inputs}) => ({outputs}) {{ y = Identity(x) {nodes} }}").graph)


STREAM = "float[B, S, 3] x"


def test_the_inputs_of_a_call() -> None:
    inputs = found(
        f"{STREAM}, int64[B, T] attention_mask, int64[B, S] position_ids, float[B, 4, 3] conv, float[B, 2, P, 4] past",
        "float[B, S, 3] y, float[B, 4, 3] next_conv, float[B, 2, Q, 4] present",
        "next_conv = Identity(conv) present = Identity(past)",
    )
    assert inputs.mask is not None
    assert inputs.positions is not None
    assert inputs.cache is not None
    assert (inputs.mask.name, inputs.positions.name) == ("attention_mask", "position_ids")
    assert (inputs.cache.value.name, inputs.cache.axis) == ("past", 2)


def test_a_cache_of_fixed_size_shows_nothing() -> None:
    fixed = found(
        f"{STREAM}, int64[B, T] attention_mask, float[B, 2, 16, 4] past",
        "float[B, S, 3] y, float[B, 2, 16, 4] present",
        "present = Identity(past)",
    )
    named = found(
        f"{STREAM}, int64[B, T] attention_mask, float[B, 2, C, 4] past",
        "float[B, S, 3] y, float[B, 2, C, 4] present",
        "present = Identity(past)",
    )
    assert (fixed.cache, named.cache) == (None, None)


def test_positions_on_three_axes_are_no_count() -> None:
    assert found(f"{STREAM}, int64[B, T] attention_mask, int64[3, B, S] position_ids").positions is None


def test_a_graph_without_a_mask() -> None:
    assert found(f"{STREAM}, int64[B, S] position_ids") == CallInputs()


@pytest.mark.parametrize("shape", ["float[B, 1, S, T]", "bool[B, 1, S, T]", "float[B, S, T]"])
def test_a_mask_that_shows_who_attends_to_whom_is_refused(shape: str) -> None:
    with pytest.raises(GuardError) as refused:
        found(f"{STREAM}, {shape} attention_mask")
    sizes = shape[shape.index("[") :]
    assert str(refused.value) == (
        f"attention_mask has shape {sizes}, and only a mask [batch, tokens] shows which token of a call is the last; "
        "export the decoder with such a mask, or choose --positions all"
    )


def test_the_mask_of_a_whole_encoder_decoder_is_the_decoders() -> None:
    both = f"{STREAM}, int64[B, T] attention_mask, int64[B, S] decoder_attention_mask, int64[B, S] decoder_input_ids"
    inputs = found(both)
    assert inputs.mask is not None
    assert inputs.mask.name == "decoder_attention_mask"
    assert found(f"{STREAM}, int64[B, T] attention_mask, int64[B, S] decoder_input_ids") == CallInputs()


FOUR_AXES = """
g (float[B, S, 16] inputs_embeds, float[B, 1, S, T] attention_mask) => (float[B, S, 16] y) {
    turned = Transpose <perm = [0, 2, 1]> (inputs_embeds)
    scores = MatMul(inputs_embeds, turned)
    shares = Softmax(scores)
    mixed = MatMul(shares, inputs_embeds)
    y = Add(inputs_embeds, mixed)
}
"""


def test_a_mask_that_need_not_be_read_is_no_obstacle() -> None:
    """Positions `all` in a mode without a supervisor reads no mask; whatever reads at the last token does."""
    model = text_model(FOUR_AXES)
    anatomy = dissect(model)
    everywhere = plan_guard(model, anatomy, directions(), GuardSpec(mode="project", positions="all"))
    assert everywhere.mask == ""
    for spec in (
        GuardSpec(mode="project"),
        GuardSpec(mode="supervise", positions="all"),
        GuardSpec(mode="restore", positions="all", telemetry=True),
        GuardSpec(mode="restore", positions="all", gate="prompt"),
    ):
        with pytest.raises(GuardError, match=r"^attention_mask has shape \[B, 1, S, T\]"):
            plan_guard(model, anatomy, directions(), spec)
    assert mask_input(text_model(FOUR_AXES.replace(", float[B, 1, S, T] attention_mask", "")).graph) is None


@pytest.mark.parametrize(
    ("mask", "length", "past", "own"),
    [
        ([[1, 1, 1, 0]], 2, 2, [[1, 0]]),  # past + present, padded on the right
        ([[1, 1, 1, 0]], 2, 4, [[1, 1]]),  # static, the cache a buffer
        ([[1, 1, 0, 0]], 2, 0, [[1, 1]]),  # static, the first call
        ([[0, 1, 1, 1, 0], [1, 1, 1, 1, 0]], 4, 5, [[0, 1, 1, 1], [1, 1, 1, 1]]),
        ([[1]], 3, 0, [[1, 1, 1]]),
    ],
)
def test_the_mask_of_a_calls_own_tokens(mask: list[list[int]], length: int, past: int, own: list[list[int]]) -> None:
    assert reference.call_mask(np.array(mask), length, past).tolist() == own


FIXED_CACHE = """
g (float[B, S, 16] inputs_embeds, int64[B, T] attention_mask, float[B, 1, 32, 16] past_keyPOSITIONS)
=> (float[B, S, 16] y, float[B, 1, 32, 16] present_key) {
    turned = Transpose <perm = [0, 2, 1]> (inputs_embeds)
    scores = MatMul(inputs_embeds, turned)
    shares = Softmax(scores)
    mixed = MatMul(shares, inputs_embeds)
    y = Add(inputs_embeds, mixed)
    present_key = Identity(past_key)
}
"""


def test_the_plan_says_what_a_fixed_cache_hides() -> None:
    note = (
        "the KV cache has a fixed size and there are no position_ids: where a prompt is fed in parts, do not pad the later "
        "ones on the right, or their last token is not edited"
    )
    for positions, told in (("", True), (", int64[B, S] position_ids", False), (", int64[3, B, S] position_ids", True)):
        model = text_model(FIXED_CACHE.replace("POSITIONS", positions))
        assert (note in plan_guard(model, dissect(model), directions(), GuardSpec(mode="project")).notes) == told
    everywhere = plan_guard(model, dissect(model), directions(), GuardSpec(mode="project", positions="all"))
    assert note not in everywhere.notes
