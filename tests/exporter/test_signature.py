"""Proof inputs made from a graph's own signature: the full proof runs, with decode steps wherever the graph has state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hand_graphs import text_model
from random_directions import random_directions, write_directions

import vlmguard
from vlmguard.exporter.proof.inputs import given_inputs, signature_inputs
from vlmguard.exporter.proof.prove_closed import roll
from vlmguard.exporter.proof.signature import VARIANTS, why_made
from vlmguard.graphs.errors import GuardError, RunFailed
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.roles import InputRoles
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.decoder import open_decoder

pytest.importorskip("onnxruntime")

WIDTH, VOCABULARY = 8, 9
HEADER = '<ir_version: 9, opset_import: ["" : 21]>\n'
TOKENS, MASK = "int64[B, S] input_ids", "int64[B, T] attention_mask"


def decoder(
    inputs: str,
    entering: str = "",
    cache: str = "",
    logits: str = "float[B, S, 9] logits",
    outputs: str = "",
    layer: str = "",
) -> str:
    """Two layers of attention, every token seeing all; `entering` makes `more`, which is added to the embeddings.

    Args:
        inputs: of the graph.
        entering: nodes that make `more [batch, sequence, 8]`.
        cache: of each layer, an input with N for the layer's number.
        outputs: of each layer.
        layer: further nodes of each layer N; its stream is xN.
    """
    weights = f"float[{VOCABULARY}, {WIDTH}] table, float[{WIDTH}, {VOCABULARY}] head"
    nodes = ["rows = Gather (table, input_ids)", entering, "x0 = Add (rows, more)" if entering else "x0 = Neg (rows)"]
    for n in range(2):
        nodes += [
            f"k{n} = Transpose <perm = [0, 2, 1]> (x{n})",
            f"s{n} = MatMul (x{n}, k{n})",
            f"p{n} = Softmax (s{n})",
            f"a{n} = MatMul (p{n}, x{n})",
            f"x{n + 1} = Add (x{n}, a{n})",
            layer.replace("N", str(n)),
        ]
    taken = ", ".join([inputs, *(cache.replace("N", str(n)) for n in range(2) if cache)])
    given = ", ".join([logits, *(outputs.replace("N", str(n)) for n in range(2) if outputs)])
    body = "\n".join(nodes)
    return f"{HEADER}g ({taken}) => ({given}) <{weights}> {{ {body} logits = MatMul (x2, head) }}"


def per_token(value: str) -> str:
    """Nodes that make `more [batch, sequence, 8]` of a float value `[batch, sequence, any]`."""
    return f"more = ReduceSum <keepdims = 1> ({value}, axis)".replace("axis", "last")


LAST = "last = Constant <value_ints = [-1]> ()"
# name -> graph, calls of one roll, kinds of values
GRAPHS: dict[str, tuple[str, int, int]] = {
    "a batch of one": (
        decoder("int64[1, S] input_ids, int64[1, T] attention_mask", logits="float[1, S, 9] logits"),
        5,
        1,
    ),
    "six tokens a call": (
        decoder("int64[B, 6] input_ids, int64[B, 6] attention_mask", logits="float[B, 6, 9] logits"),
        1,
        1,
    ),
    "three rows of positions": (
        decoder(
            f"{TOKENS}, {MASK}, int64[A, B, S] position_ids",
            "three = Constant <value_ints = [3, 1, 1]> () first, second, third = Split <num_outputs = 3> (position_ids) "
            "joined = Add (first, third) numbers = Cast <to = 1> (joined) zero = Constant <value_ints = [0]> () "
            "flat = Squeeze (numbers, zero) end = Constant <value_ints = [2]> () more = Unsqueeze (flat, end)",
        ),
        5,
        len(VARIANTS),
    ),
    "kinds of tokens": (
        decoder(
            f"{TOKENS}, {MASK}, int64[B, S] mm_token_type_ids",
            "kinds = Cast <to = 1> (mm_token_type_ids) end = Constant <value_ints = [2]> () more = Unsqueeze (kinds, end)",
        ),
        5,
        len(VARIANTS),
    ),
    "rows of an adapter and a switch": (
        decoder(
            f"{TOKENS}, {MASK}, float[R, 8] lora_a, bool[1] lora_on",
            "on = Cast <to = 1> (lora_on) sized = Mul (lora_a, on) turned = Transpose <perm = [1, 0]> (lora_a) "
            "square = MatMul (turned, sized) more = MatMul (rows, square)",
        ),
        5,
        len(VARIANTS),
    ),
    "pictures": (
        decoder(
            f"{TOKENS}, {MASK}, float[B, 3, H, W] pixel_values",
            "at = Constant <value_ints = [1, 2, 3]> () light = ReduceMean <keepdims = 0> (pixel_values, at) "
            "end = Constant <value_ints = [1, 2]> () more = Unsqueeze (light, end)",
        ),
        5,
        len(VARIANTS),
    ),
    "inputs of each layer": (
        decoder(
            f"{TOKENS}, {MASK}, float[B, S, L, P] per_layer_inputs",
            "at = Constant <value_ints = [2, 3]> () sum = ReduceSum <keepdims = 0> (per_layer_inputs, at) "
            "end = Constant <value_ints = [2]> () more = Unsqueeze (sum, end)",
        ),
        5,
        len(VARIANTS),
    ),
    "a mask of four dimensions": (
        decoder(
            f"{TOKENS}, float[B, 1, S, T] attention_mask",
            "at = Constant <value_ints = [1, 3]> () sum = ReduceMax <keepdims = 0> (attention_mask, at) "
            "end = Constant <value_ints = [2]> () more = Unsqueeze (sum, end)",
        ),
        5,
        1,
    ),
    "buffers of fixed size": (
        decoder(
            "int64[B, S] input_ids, int64[B, 16] attention_mask, int64[S] cache_position",
            "spot = Cast <to = 1> (cache_position) end = Constant <value_ints = [0, 2]> () more = Unsqueeze (spot, end)",
            "float[B, 1, 16, 8] state_N",
            outputs="float[B, 1, 16, 8] updated_N",
            layer="axes_N = Constant <value_ints = [1]> () mean_N = ReduceMean <keepdims = 1> (xN, axes_N) "
            "row_N = Unsqueeze (mean_N, axes_N) updated_N = Add (state_N, row_N)",
        ),
        5,
        len(VARIANTS),
    ),
}


def saved(text: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    model = text_model(text)
    random = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.Tensor(
            random.normal(0, 0.5, value.const_value.shape).astype(np.float32), name=value.name
        )
    path.write_bytes(graph_bytes(model))
    return path


@pytest.mark.parametrize("name", GRAPHS)
def test_the_full_proof_runs_on_what_the_signature_says(name: str, tmp_path: Path) -> None:
    text, calls, kinds = GRAPHS[name]
    path = saved(text, tmp_path / "m")
    package = open_package(path)
    assert why_made(package.load_decoder().graph) or name == "a mask of four dimensions"
    inputs = signature_inputs(package, WIDTH, "hand-made")
    assert len(inputs.batches) == kinds
    session = open_decoder(package, given=True)
    assert [len(roll(session, batch, None)) for batch in inputs.batches] == [calls] * kinds
    assert ("one call alone" in inputs.origin) == (calls == 1)
    directions = write_directions(tmp_path / "d.safetensors", random_directions(WIDTH, [0, 1]))
    everywhere = name in (
        "a mask of four dimensions",
        "buffers of fixed size",
    )  # which token is last: tests of positions
    spec = GuardSpec(mode="project", positions="all" if everywhere else "last")
    done = vlmguard.export(path, tmp_path / "out", directions=directions, spec=spec)
    assert done.written and all(check.ok for decoder in done.decoders for check in decoder.proof)


def test_every_kind_of_values_is_another(tmp_path: Path) -> None:
    package = open_package(saved(GRAPHS["rows of an adapter and a switch"][0], tmp_path))
    inputs = signature_inputs(package, WIDTH, "hand-made")
    values = [batch.further.between(0, 12) for batch in inputs.batches if batch.further is not None]
    assert [bool((found["lora_a"] == 0).all()) for found in values] == [True, False, False]
    assert not np.array_equal(values[1]["lora_a"], values[2]["lora_a"])
    assert values[1]["lora_on"].dtype == np.bool_
    again = inputs.batches[1].further
    assert again is not None and np.array_equal(again.between(0, 12)["lora_a"], values[1]["lora_a"])


def test_an_input_that_nothing_fits_is_named(tmp_path: Path) -> None:
    """A size that the graph wants and does not say."""
    text = decoder(
        f"{TOKENS}, {MASK}, float[Q] odd",
        "wide = Constant <value_ints = [4099]> () long = Reshape (odd, wide) end = Constant <value_ints = [0]> () "
        "light = ReduceSum <keepdims = 1> (long, end) more = Unsqueeze (light, end)",
    )
    path = saved(text, tmp_path / "m")
    with pytest.raises(GuardError) as caught:
        signature_inputs(open_package(path), WIDTH, "hand-made")
    said = str(caught.value)
    assert said.startswith(f"{path}: no values could be made for its inputs 'odd' (float [Q]) (")
    assert said.endswith("; give inputs that it runs on with --proof-inputs")

    # by default each guard is then run by itself, and the record has the reason; the full proof is refused
    asked = {"directions": write_directions(tmp_path / "d.safetensors", random_directions(WIDTH, [1]))}
    done = vlmguard.export(path, tmp_path / "out", spec=GuardSpec(mode="project"), **asked)
    assert done.proved.level == "local"
    assert done.proved.why.startswith("no values could be made for its inputs 'odd' (float [Q]) (")
    with pytest.raises(GuardError, match=r"; give inputs that it runs on with --proof-inputs$"):
        vlmguard.export(path, tmp_path / "full", spec=GuardSpec(mode="project"), proof="full", **asked)
    assert not (tmp_path / "full").exists()


def test_a_model_that_does_not_run_is_no_proof(tmp_path: Path) -> None:
    """What to do depends on whose fault it is: the inputs', or the machine's, which lacks an operator."""
    path = saved(decoder(f"{TOKENS}, {MASK}"), tmp_path / "m")
    np.savez(tmp_path / "in.npz", input_ids=np.full((2, 5), 10**6), attention_mask=np.ones((2, 5), np.int64))
    asked = {"directions": write_directions(tmp_path / "d.safetensors", random_directions(WIDTH, [1]))}
    with pytest.raises(RunFailed) as refused:
        vlmguard.export(
            path, tmp_path / "out", spec=GuardSpec(mode="project"), proof_inputs=[tmp_path / "in.npz"], **asked
        )
    said = str(refused.value)
    assert said.startswith("onnxruntime cannot run the graph on these inputs (")
    assert said.endswith(
        "; give inputs that it runs on with --proof-inputs, or, if this machine cannot run the model at all, prove each guard "
        "by itself with --proof local"
    )
    assert not (tmp_path / "out").exists()


def test_given_inputs_go_by_the_graphs_own_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", tokens=np.ones((2, 5), np.int64), seen=np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    (batch,) = given_inputs([tmp_path / "in.npz"], InputRoles(tokens="tokens", mask="seen")).batches
    np.testing.assert_array_equal(batch.mask[0], [1, 1, 1, 0, 0])
    with pytest.raises(
        GuardError, match=r"has no input_ids \[batch, sequence\] or inputs_embeds, but tokens, seen; add it"
    ):
        given_inputs([tmp_path / "in.npz"])
