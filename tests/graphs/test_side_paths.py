"""Decoders with side paths: what enters layers beside the stream, what is refused, and what the proof finds anew."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import Guarded, directions, guard_model, run, value_called
from text_layers import STREAM, WEIGHTS, WIDTH, attention, graph, mlp, norm

from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.errors import AnatomyNotFound
from vlmguard.graphs.layer_count import LayerCount
from vlmguard.graphs.proof.structure import guard_dominates, prove_structure
from vlmguard.graphs.side_paths import SidePath, described, spelled
from vlmguard.graphs.spec import GuardSpec

pytest.importorskip("onnxruntime")

LAYERS = 4
INPUTS = f"{STREAM}, int64[B, S] input_ids"
TABLE = WEIGHTS.replace("<", "<float[7, 16] table, ", 1).replace(
    "int64[3]", "int64[1] axis = {1}, int64 place = {1}, int64[3]", 1
)
EMBEDDED = "rows = Gather(table, input_ids) per_x = MatMul(x, w) per = Add(per_x, rows) "


def gated(layer: int, state: str) -> str:
    """An embedding that is scaled by what the stream says, as Gemma 4 does it; `h0` is the layer's output."""
    return (
        f"g{layer}_in = MatMul({state}, w) g{layer} = Mul(g{layer}_in, per{layer}) e{layer} = MatMul(g{layer}, w) "
        f"h{layer} = Add({state}, e{layer}) "
    )


def decoder(per_layer: bool = True, shared: bool = False, between: str = "", per: str = "per") -> ir.Model:
    """Attention and an embedding in every layer; `shared`: layers 2 and 3 attend to what layers 0 and 1 made.

    Args:
        between: text that makes the value `per` of the embedding.
    """
    body, x = EMBEDDED + between, "x"
    for n in range(LAYERS):
        body += f"per{n} = Mul({per}, scale) " + norm(f"n{n}", x)
        if shared and n >= 2:
            keys = f"a{n - 2}_turned", f"v{n - 2}"
            body += f"a{n}_s = MatMul(n{n}, {keys[0]}) a{n}_p = Softmax(a{n}_s) a{n} = MatMul(a{n}_p, {keys[1]}) "
        elif shared:
            body += f"v{n} = MatMul(n{n}, w) " + attention(f"a{n}", f"n{n}", f"v{n}")
        else:
            body += attention(f"a{n}", f"n{n}", f"n{n}")
        body += f"s{n} = Add({x}, a{n}) "
        body += gated(n, f"s{n}") if per_layer else mlp(f"m{n}", f"s{n}") + f"h{n} = Add(s{n}, m{n}) "
        x = f"h{n}"
    return graph(body + norm("end", x), "end", INPUTS, TABLE)


def tokens(layer: int) -> SidePath:
    return SidePath(f"per{layer}", f"g{layer}", layer, "tokens")


def memory(layer: int) -> list[SidePath]:
    keys = SidePath(f"a{layer - 2}_turned", f"a{layer}_s", layer, "keys and values", (layer - 2,))
    return [keys, SidePath(f"v{layer - 2}", f"a{layer}", layer, "keys and values", (layer - 2,))]


def refusal(model: ir.Model, declared: LayerCount | int | None = None) -> str:
    with pytest.raises(AnatomyNotFound) as raised:
        dissect(model, declared)
    return str(raised.value)


@pytest.mark.parametrize("declared", [None, LAYERS])
def test_embeddings_of_layers_are_side_paths(declared: int | None) -> None:
    anatomy = dissect(decoder(), declared)
    assert [site.value for site in anatomy.sites] == [f"h{n}" for n in range(LAYERS)]
    assert anatomy.side_paths == tuple(map(tokens, range(LAYERS)))
    assert anatomy.to_json()["side_paths"][0] == {
        "value": "per0",
        "into": "g0",
        "layer": 0,
        "carries": "tokens",
        "made_by": [],
    }


@pytest.mark.parametrize("per_layer", [False, True])
def test_keys_and_values_that_layers_share_are_side_paths(per_layer: bool) -> None:
    anatomy = dissect(decoder(per_layer, shared=True), LAYERS)
    assert [site.value for site in anatomy.sites] == [f"h{n}" for n in range(LAYERS)]
    expected = [
        path for n in range(LAYERS) for path in (*(memory(n) if n >= 2 else []), *([tokens(n)] if per_layer else []))
    ]
    assert list(anatomy.side_paths) == expected


def test_side_paths_in_words() -> None:
    assert described([tokens(0), tokens(1), tokens(2), *memory(3)]) == [
        "embeddings of single tokens enter layers 0 to 2 beside the stream; they pass no attention, and guards do not edit "
        "them",
        "keys and values made by layer 1 are read by layer 3 too; a guard edits those that are made behind it",
    ]
    assert described([]) == []
    assert spelled([5, 1, 2, 3, 5, 8, 9]) == "1 to 3, 5, 8, 9"


MORE = "several streams, or paths past the sums (embeddings per layer, keys and values that layers share)"
NO_ROWS = "it is not known to hold a row for each token that is computed from that token alone"
BAD = {
    "an attention on the way": (attention("m", "per", "per"), "MatMul 'm_scores'"),
    "a running sum on the way": ("m = CumSum(per, place) ", "CumSum 'm'"),
    "a mean of all tokens": ("mean = ReduceMean <keepdims = 1> (per, axis) m = Sub(per, mean) ", "ReduceMean 'mean'"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_embedding_that_saw_other_tokens_is_refused(name: str) -> None:
    between, at = BAD[name]
    assert refusal(decoder(between=between, per="m"), LAYERS) == (
        f"'per0' enters layer 0 past the 4 layers' residual sums, and {NO_ROWS} ({at}): {MORE}; such decoders cannot be guarded"
    )


def test_an_earlier_state_may_not_come_back_but_through_attention() -> None:
    model = decoder(shared=True)
    gate = value_called(model, "g3").producer()
    assert gate is not None
    gate.replace_input_with(1, value_called(model, "v1"))
    assert refusal(model, LAYERS) == (
        "'v1' enters layer 3 past the 4 layers' residual sums, and it carries the input of layer 1 and enters through Mul, not "
        f"through attention: {MORE}; such decoders cannot be guarded"
    )


def entered(operator: str) -> ir.Model:
    """An embedding per layer that enters the stream itself, behind the layer's sum."""
    body, x = EMBEDDED + "".join(f"per{n} = Mul(per, scale) " for n in range(3)), "x"
    for n in range(3):
        body += norm(f"n{n}", x) + attention(f"a{n}", f"n{n}", f"n{n}") + f"s{n} = Add({x}, a{n}) "
        body += f"h{n} = {operator}(s{n}, per{n}) "
        x = f"h{n}"
    return graph(body, x, INPUTS, TABLE)


def test_an_embedding_may_not_enter_the_stream_itself() -> None:
    assert refusal(entered("Mul"), 3) == (
        f"'per0' enters layer 0 past the 3 layers' residual sums, and it enters the stream itself (Mul 'h0'): {MORE}; "
        "such decoders cannot be guarded"
    )
    assert refusal(entered("Add"), 3) == (
        "the stream splits: 3 attention nodes follow one another inside layer 0 without a sum that all paths pass (best "
        f"partial match: 1 layers of the config's 3): {MORE}; such decoders cannot be guarded"
    )


# The guard and its proof

FEEDS = {
    "x": np.random.default_rng(5).normal(0, 1, (2, 6, WIDTH)).astype(np.float32),
    "input_ids": np.array([[1, 2, 3, 4, 5, 6], [0, 0, 6, 5, 4, 3]]),
}


def guarded(layers: tuple[int, ...] = (1,), shared: bool = True, positions: str = "all") -> Guarded:
    spec = GuardSpec(mode="project", layers=layers, positions=positions)  # type: ignore[arg-type]
    return guard_model(decoder(shared=shared), directions(layers), spec)


def by_hand(layers: tuple[int, ...]) -> np.ndarray:
    """The logits with the projection written into the graph's text, as a hook would do it."""
    found = directions(layers)
    model = decoder(shared=True)
    for layer in layers:
        ssd = found.layers[layer].ssd.astype(np.float32)
        outside = ir.Value(name=f"out{layer}", const_value=ir.tensor(np.eye(WIDTH, dtype=np.float32) - ssd.T @ ssd))
        assert outside.const_value is not None
        outside.const_value.name = outside.name
        model.graph.register_initializer(outside)
        raw = value_called(model, f"h{layer}")
        product = ir.node("MatMul", [raw, outside], outputs=[ir.Value(name=f"edited{layer}")])
        for node, place in tuple(raw.uses()):
            if node is not product:
                node.replace_input_with(place, product.outputs[0])
        maker = raw.producer()
        assert maker is not None
        model.graph.insert_after(maker, product)
    return run(model, FEEDS)["logits"]


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_the_guarded_logits_are_those_of_a_hook(layers: tuple[int, ...]) -> None:
    done = guarded(layers)
    source = decoder(shared=True)
    assert all(check.ok for check in prove_structure(source, done.model, done.anatomy, done.plan, done.report))
    expected, found = by_hand(layers), run(done.model, FEEDS)["logits"]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected - run(source, FEEDS)["logits"]).max() > 1e-2


def proof(done: Guarded) -> str:
    """What the proof finds wrong; empty for nothing."""
    check = guard_dominates(done.model, done.anatomy, done.plan, done.report)
    return "" if check.ok else check.note


def test_the_plan_and_the_proof_name_the_side_paths() -> None:
    done = guarded()
    assert [note for note in done.plan.notes if note in described(done.anatomy.side_paths)] == described(
        done.anatomy.side_paths
    )
    check = guard_dominates(done.model, done.anatomy, done.plan, done.report)
    assert check.ok and check.note == "besides: " + "; ".join(described(done.anatomy.side_paths))


def reread(done: Guarded, reader: str, place: int, value: str) -> None:
    """Let the maker of a value read another value."""
    node = value_called(done.model, reader).producer()
    assert node is not None
    node.replace_input_with(place, value_called(done.model, value))


AROUND = "'x' reaches 'logits' on a way around the guard"


@pytest.mark.parametrize(
    ("reader", "place", "value", "said"),
    [
        # an embedding becomes what an attention made
        ("per2", 0, "a0", f"'per2' enters layer 2 past the guards, and {NO_ROWS} (MatMul 'a0_scores')"),
        # the state of an earlier layer
        (
            "per2",
            0,
            "h0",
            "'per2' enters layer 2 past the guards, and it carries the input of layer 1 and enters through Mul, not through "
            "attention",
        ),
        # the unguarded state
        ("per2", 0, "h1", "layer 1: 'h1' is read past the guard"),
        # the sum before it
        ("per2", 0, "s1", f"'per2' enters layer 2 past the guards, and {NO_ROWS} (MatMul 'a1_scores')"),
        # values are made of another layer's attention
        (
            "v1",
            0,
            "a0",
            f"'a1_turned' enters layer 3 past the guards, and {NO_ROWS} (MatMul 'a0_scores'); 'v1' enters layer 3 past the "
            f"guards, and {NO_ROWS} (MatMul 'a0_scores')",
        ),
        # paths that the anatomy does not know
        ("e2", 0, "per", "layer 1: a path avoids the guard"),
        ("e3", 0, "v1", "layer 1: a path avoids the guard"),
        ("n2", 0, "h0", "layer 1: a path avoids the guard"),
    ],
)
def test_a_side_path_that_carries_the_stream_fails_the_proof(reader: str, place: int, value: str, said: str) -> None:
    done = guarded()
    assert proof(done) == ""
    reread(done, reader, place, value)
    done.model.graph.sort()
    assert proof(done) == said
