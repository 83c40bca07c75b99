"""genai's `decoder.pipeline`: the stage that holds the whole stream is the decoder; a stream in parts is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hand_graphs import VOCABULARY, WIDTH, decoder, text_model
from random_directions import random_directions, write_directions

import vlmguard
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.genai_pipeline import stage_files
from vlmguard.graphs.graph_io import graph_bytes
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.decoder import open_decoder
from vlmguard.runtime.decoder_inputs import PromptBatch

pytest.importorskip("onnxruntime")


def write_pipeline(root: Path, layers: tuple[int, ...] = (2,), declared: int | None = None) -> Path:
    """Embeddings, one stage of layers for each number, and a head with the logits."""
    root.mkdir()
    stages_of_layers = {f"transformer_{number}.onnx": decoder(layers=count) for number, count in enumerate(layers)}
    for stage in stages_of_layers.values():
        stage.graph.outputs[0].name = "states"
    graphs = {
        "embeddings.onnx": text_model(
            f"""g (int64[batch, sequence] input_ids) => (float[batch, sequence, {WIDTH}] inputs_embeds)
            <float[9, {WIDTH}] table> {{ inputs_embeds = Gather (table, input_ids) }}"""
        ),
        **stages_of_layers,
        "head.onnx": text_model(
            f"""g (float[batch, sequence, {VOCABULARY}] states) => (float[batch, sequence, 2] logits)
            <float[{VOCABULARY}, 2] head> {{ logits = MatMul (states, head) }}"""
        ),
    }
    for name, model in graphs.items():
        (root / name).write_bytes(graph_bytes(model))
    stages = [{name.partition(".")[0]: {"filename": name}} for name in graphs]
    content = {"pipeline": stages, "num_hidden_layers": sum(layers) if declared is None else declared}
    (root / "genai_config.json").write_text(json.dumps({"model": {"decoder": content}}))
    return root


def test_the_stage_with_the_layers_is_the_decoder_and_the_others_run_around_it(tmp_path: Path) -> None:
    package = open_package(write_pipeline(tmp_path / "m"))
    assert package.decoder.name == "transformer_0.onnx" and package.others == () and package.left_out == ()
    assert (package.embed_tokens, package.head) == (tmp_path / "m/embeddings.onnx", tmp_path / "m/head.onnx")
    session = open_decoder(package)
    ids = np.zeros((2, 3), np.int64)
    outputs, _ = session.prefill(PromptBatch(ids, np.ones_like(ids), np.ones((2, 3, WIDTH), np.float32)))
    scores = session.last_logits(outputs)
    np.testing.assert_allclose(scores, np.repeat(outputs["states"][:, -1].sum(1, keepdims=True), 2, 1), rtol=1e-5)


def test_a_pipeline_is_guarded_and_verified(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "m")
    directions = write_directions(tmp_path / "d.safetensors", random_directions(WIDTH, [0, 1]))
    done = vlmguard.export(root, tmp_path / "out", directions=directions, spec=GuardSpec(mode="project"))
    assert all(check.ok for decoder in done.decoders for check in decoder.proof)
    assert verify(done.out, root).ok
    assert {path.name for path in root.iterdir()} <= {path.name for path in done.out.iterdir()}
    for name in ("embeddings.onnx", "head.onnx", "genai_config.json"):
        assert (root / name).read_bytes() == (done.out / name).read_bytes()


def test_a_graph_that_outputs_logits_from_more_than_the_last_states_is_no_head(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "m")
    model = text_model(
        f"""g (float[batch, sequence, {VOCABULARY}] states, float[batch, sequence, 2] more)
        => (float[batch, sequence, 2] logits)
        <float[{VOCABULARY}, 2] head> {{ scores = MatMul (states, head) logits = Add (scores, more) }}"""
    )
    (root / "head.onnx").write_bytes(graph_bytes(model))
    directions = write_directions(tmp_path / "d.safetensors", random_directions(WIDTH, [0, 1]))
    done = vlmguard.export(root, tmp_path / "out", directions=directions, spec=GuardSpec(mode="project"))
    (failed,) = (check for check in verify(done.out).checks if not check.ok)
    assert failed.name == "every graph is a verified decoder or holds none"
    assert failed.note == "head.onnx outputs logits, and is no verified decoder"


def refusal(path: Path) -> str:
    with pytest.raises(GuardError) as caught:
        open_package(path)
    return str(caught.value)


def test_layers_that_are_spread_over_stages_are_refused(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "m", layers=(1, 2))
    assert refusal(root) == (
        f"{root / 'genai_config.json'}: decoder.pipeline spreads the layers over several graphs (transformer_0.onnx 1, "
        "transformer_1.onnx 2), and a guard needs the whole residual stream in one; export the model without splitting its "
        "layers"
    )


def test_two_stages_that_each_hold_all_layers_are_both_guarded(tmp_path: Path) -> None:
    """One for prompts, one for single tokens, as recipes for NPUs have it."""
    root = write_pipeline(tmp_path / "m", layers=(2, 2), declared=2)
    package = open_package(root)
    assert [view.decoder.name for view in package.views()] == ["transformer_0.onnx", "transformer_1.onnx"]
    assert refusal(root / "transformer_1.onnx") == (
        f"{root / 'transformer_1.onnx'}: is one of the decoder graphs of a genai pipeline (transformer_0.onnx, "
        "transformer_1.onnx); name the folder, so that all are guarded"
    )


def test_a_pipeline_without_layers_is_refused(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "m", layers=())
    assert refusal(root) == (
        f"{root / 'genai_config.json'}: no stage of decoder.pipeline (embeddings.onnx, head.onnx) holds decoder layers; is it "
        "a decoder?"
    )


def test_a_stage_outside_the_folder_is_refused(tmp_path: Path) -> None:
    root = write_pipeline(tmp_path / "m")
    config = json.loads((root / "genai_config.json").read_text())
    config["model"]["decoder"]["pipeline"][0] = {"embeddings": {"filename": "../other.onnx"}}
    (root / "genai_config.json").write_text(json.dumps(config))
    assert (
        refusal(root) == f"{root}: names a file outside itself (../other.onnx); do not use it, or fix genai_config.json"
    )


@pytest.mark.parametrize("pipeline", [None, 3, [3], [{"a": 3}], [{"a": {"filename": 3}}], {}])
def test_a_pipeline_of_another_form_names_no_files(pipeline: object) -> None:
    assert stage_files({"model": {"decoder": {"pipeline": pipeline}}}) == []
