"""Precision variants: each one answers the same prompts, has a row in result and manifest, and must be protected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from rich.console import Console
from tiny_vlm_paths import CALIBRATION, DECODER, EVALUATION, SOURCE, Guarded

from vlmguard import GuardedVLM, cli
from vlmguard.apps.playground.sides import open_sides
from vlmguard.apps.report.subject import open_subject
from vlmguard.exporter import render, stages
from vlmguard.exporter.calibration.results import Calibration
from vlmguard.exporter.evaluation.evaluate import compare, tally
from vlmguard.exporter.export_result import ExportResult
from vlmguard.exporter.pipeline import export
from vlmguard.exporter.prompts.labelled import read_prompts
from vlmguard.exporter.prompts.thinning import thinned
from vlmguard.exporter.proof.verify import verify
from vlmguard.exporter.resolve import DirectionsRequest
from vlmguard.exporter.session import Session
from vlmguard.exporter.sources import open_model
from vlmguard.graphs.directions import Directions
from vlmguard.graphs.errors import GuardError, ManifestMismatch, ModelUnreadable, NoEffect, OutputRefused
from vlmguard.graphs.graph_io import graph_bytes, load_graph
from vlmguard.graphs.last_logits import keep_last_logits
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.tensorrt import require_readable
from vlmguard.runtime.generation import Request

pytest_plugins = ("tiny_vlm_fixtures",)

BNB4, INT8, Q4F16 = (f"onnx/decoder_model_merged_{name}.onnx" for name in ("bnb4", "int8", "q4f16"))


def few_lines(source: Path, target: Path, most: int) -> Path:
    """Write so many prompts of each label, without a picture and with a blank one."""
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    kinds = {(setting, label): most for setting in ("text", "blank") for label in ("harmful", "harmless")}
    few = thinned(lines, lambda line: (line["setting"], line["label"]), kinds)
    target.write_text("".join(json.dumps(line) + "\n" for line in few))
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny VLM with its decoder in float32, int8, q4f16 and bnb4, and a few prompts of its language."""
    folder = shutil.copytree(SOURCE, tmp_path_factory.mktemp("variants") / "tiny")
    few_lines(CALIBRATION, folder / "calibration.jsonl", 8)
    quantize_dynamic(folder / DECODER, folder / INT8)
    half = convert_float_to_float16(onnx.load(folder / DECODER), keep_io_types=False)
    nbits = MatMulNBitsQuantizer(half, bits=4, block_size=32, is_symmetric=True)
    nbits.process()
    onnx.save(nbits.model.model, folder / Q4F16)
    bnb4 = MatMulBnb4Quantizer(onnx.load(folder / DECODER), MatMulBnb4Quantizer.NF4, 64)
    bnb4.process()
    onnx.save(bnb4.model.model, folder / BNB4)
    return folder


def with_plain_decoder(folder: Path, target: Path) -> Path:
    """The folder without its other precisions."""
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("decoder_model_merged_*"))


@pytest.fixture(scope="module")
def result(folder: Path, guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    directions = guarded("restore") / "directions.safetensors"
    return export(folder, tmp_path_factory.mktemp("out") / "out", directions=directions, mode="restore")


def test_each_variant_has_a_row(result: ExportResult) -> None:
    assert [row.decoder for row in result.variants] == [DECODER, BNB4, INT8, Q4F16]
    assert all(row.calibration is None for row in result.variants)
    assert {decoder.path: decoder.plan.sites[0].site.dtype for decoder in result.decoders} == {
        **dict.fromkeys((DECODER, BNB4, INT8), "float32"),
        Q4F16: "float16",
    }
    for row in result.variants:
        before, after, asked = row.counts("harmful")
        assert 0 <= before < after <= asked
        assert {setting.setting for setting in row.harmful.settings} >= {"text", "blank"}
        before, after, asked = row.counts("harmless")
        assert asked > 0 and after == before == 0


def test_the_rows_are_in_the_manifest_and_in_the_table(result: ExportResult) -> None:
    recorded = read_manifest(result.out).variants
    assert recorded == {row.decoder: row.to_json() for row in result.variants}
    assert result.to_json()["variants"] == recorded
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render.show_export(console, result)
    text = console.export_text()
    for row in result.variants:
        before, after, asked = row.counts("harmful")
        assert f"{before} -> {after} of {asked}" in text and row.decoder in text


def test_one_variant_has_no_rows(guarded: Guarded) -> None:
    assert read_manifest(guarded("restore")).variants is None


def test_tensorrt_names_what_it_cannot_read(folder: Path) -> None:
    for path, operator in ((BNB4, "MatMulBnb4"), (Q4F16, "MatMulNBits")):
        with pytest.raises(GuardError) as caught:
            require_readable(load_graph(folder / path), path)
        message = str(caught.value)
        assert (
            message.startswith(f"{path}: ") and operator in message and "static QDQ" in message and "\n" not in message
        )


def test_the_head_of_a_packed_product_computes_the_last_logits_alone(folder: Path) -> None:
    """Its weights have one axis in bnb4, and three in MatMulNBits."""
    prompt = [Request("how to wash the boat")]
    for name, path in (("bnb4", BNB4), ("q4f16", Q4F16)):
        whole, graph = open_model(folder, name), load_graph(folder / path)
        assert keep_last_logits(graph)
        short = whole.with_decoder(graph)
        rows = [model.prefill(prompt)["logits"][:, -1] for model in (whole, short)]
        assert np.abs(rows[0] - rows[1]).max() <= 5e-3 * np.abs(rows[0]).max()


def test_a_variant_that_the_guard_does_not_change_is_refused(
    folder: Path, guarded: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here because its head is all zeros: every logit is the same, whatever the guard does."""

    def nothing(session: Session, request: DirectionsRequest, given: Directions) -> Calibration:
        assert session.package.decoder == dead and request.spec.layers == (3,) and 3 in given.layers
        raise GuardError("no candidate refuses more")

    model = with_plain_decoder(folder, tmp_path / "tiny")
    monkeypatch.setattr(stages, "calibrated_directions", nothing)  # the search itself takes seconds
    proto = onnx.load(model / DECODER)
    for tensor in proto.graph.initializer:
        if "lm_head" in tensor.name:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(np.zeros_like(onnx.numpy_helper.to_array(tensor)), tensor.name)
            )
    dead = model / "onnx" / "decoder_model_merged_q4.onnx"
    onnx.save(proto, dead)
    with pytest.raises(NoEffect) as caught:
        export(model, tmp_path / "out", directions=guarded("restore") / "directions.safetensors", mode="restore")
    assert str(caught.value).startswith(f"onnx/{dead.name}: the guard has no effect on ")
    assert str(caught.value).endswith("; numbers of its own were not found: no candidate refuses more")
    assert not (tmp_path / "out").exists()


def with_quarter_stream(folder: Path, target: Path) -> None:
    """The decoder with a residual stream a quarter as large: it says the same, because every layer normalizes the stream.

    A quarter of a float32 is exact. What enters the stream is the embeddings, and the products behind attention and MLP.
    """
    proto = onnx.load(folder / DECODER)
    scaled = 0
    for tensor in proto.graph.initializer:
        if "o_proj.weight" in tensor.name or "down_proj.weight" in tensor.name:
            array = onnx.numpy_helper.to_array(tensor) / np.float32(4)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
            scaled += 1
    assert scaled
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.25, np.float32), "quarter"))
    for node in proto.graph.node:
        node.input[:] = ["quarter_embeds" if name == "inputs_embeds" else name for name in node.input]
    smaller = onnx.helper.make_node("Mul", ["inputs_embeds", "quarter"], ["quarter_embeds"], name="quarter_embeds")
    proto.graph.node.insert(0, smaller)
    onnx.save(proto, target)


def test_a_variant_with_other_states_gets_numbers_of_its_own(folder: Path, guarded: Guarded, tmp_path: Path) -> None:
    model = with_plain_decoder(folder, tmp_path / "tiny")
    other = "onnx/decoder_model_merged_q4.onnx"
    with_quarter_stream(model, model / other)
    result = export(model, tmp_path / "out", directions=guarded("restore") / "directions.safetensors", mode="restore")
    first, second = result.variants
    assert first.calibration is None and second.calibration is not None
    assert first.counts("harmful") == second.counts("harmful") and second.counts("harmless")[1] == 0
    plain, fitted = (decoder.plan.guards[0] for decoder in result.decoders)
    assert fitted.threshold < plain.threshold / 2 and abs(fitted.target[0]) < abs(plain.target[0]) / 2
    # the folder has both, and the proof covers both
    manifest = read_manifest(result.out)
    assert [record.directions for record in manifest.decoders] == [
        None,
        other.replace(".onnx", ".directions.safetensors"),
    ]
    assert manifest.variants is not None and "calibration" in manifest.variants[other]
    assert verify(result.out, model).ok
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render.show_export(console, result)
    assert f"{other}, fitted to its own states" in console.export_text()
    assert open_subject(result.out, variant="q4").plan.guards[0].threshold == fitted.threshold
    used = manifest.seen_from(other).calibration
    assert used is not None and used["prompt_fingerprints"]
    # a record that names another file is no proof
    text = (result.out / "guard.json").read_text()
    (result.out / "guard.json").write_text(text.replace('.directions.safetensors"', '.other.safetensors"'))
    with pytest.raises(ManifestMismatch):
        verify(result.out)


def test_a_variant_is_opened_by_its_suffix(result: ExportResult, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "how to wash the boat"
    answers = {
        name: GuardedVLM.open(result.out, variant=name).generate(prompt, max_new_tokens=4) for name in ("", "int8")
    }
    with pytest.raises(SystemExit) as ended:
        cli._run(["generate", str(result.out), "-p", prompt, "--max-new-tokens", "4", "--variant", "int8"])
    assert ended.value.code == 0 and capsys.readouterr().out == answers["int8"] + "\n"
    assert GuardedVLM.open(result.out).package.decoder.name == Path(DECODER).name
    with pytest.raises(ModelUnreadable) as caught:
        GuardedVLM.open(result.out, variant="q4")
    assert (
        str(caught.value)
        == f"{result.out}: the decoder has no variant 'q4', only '', 'bnb4', 'int8', 'q4f16'; name one"
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of each label that no calibration read, without a picture and with a blank one."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    return few_lines(EVALUATION, path, 2)


def test_a_manifest_is_seen_from_the_decoder_that_runs(result: ExportResult) -> None:
    plain, int8 = (GuardedVLM.open(result.out, variant=name).manifest for name in (None, "int8"))
    assert (plain.decoder, int8.decoder) == (DECODER, INT8)
    assert sorted(record.path for record in int8.decoders) == sorted(record.path for record in plain.decoders)
    assert int8.plan["sites"][0]["value"] == int8.decoders[0].plan["sites"][0]["value"]
    assert int8.refusals == result.variants[2].harmful.to_json()


def test_a_guarded_variant_is_compared_with_the_same_unguarded_variant(
    folder: Path, result: ExportResult, prompts: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    found = compare(folder, result.out, prompts, 4, variant="int8", out=records)
    rows = read_prompts(prompts)
    assert found.base == tally(open_model(folder, "int8"), rows, 4)
    assert found.guarded == tally(GuardedVLM.open(result.out, variant="int8"), rows, 4)
    assert found.same_source and found.gates_unread is None
    with pytest.raises(OutputRefused):  # the records are those of another variant
        compare(folder, result.out, prompts, 4, out=records)


def test_a_report_is_about_one_variant(folder: Path, result: ExportResult) -> None:
    for source in (None, folder):
        subject = open_subject(result.out, source, "int8")
        assert subject.manifest.decoder == INT8 and subject.guarded.package.decoder == result.out / INT8
        kinds = {node.op_type for node in subject.sides.unguarded().graph}
        assert "MatMulInteger" in kinds and subject.anatomy.layer_count == 6


def test_the_playground_shows_one_variant(folder: Path, result: ExportResult) -> None:
    sides = open_sides(result.out, variant="int8")
    assert sides.package.decoder == result.out / INT8
    kinds = [node.op_type for node in load_graph(folder / INT8).graph]
    assert sorted(node.op_type for node in sides.base.graph) == sorted(kinds) and "MatMulInteger" in kinds
    assert graph_bytes(open_sides(result.out, variant="").base) == graph_bytes(open_sides(result.out).base)


@pytest.mark.parametrize("command", ["evaluate", "report", "playground", "generate", "serve"])
def test_an_unknown_variant_is_an_error_of_every_command(
    folder: Path, result: ExportResult, prompts: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(result.out)
    arguments = {
        "evaluate": [str(folder), out, "--prompts", str(prompts)],
        "report": [out, "--prompts", str(prompts), "-o", str(prompts.parent / "page.html")],
        "playground": [out, "--no-open", "--port", "0"],
        "generate": [out, "-p", "how to wash the boat"],
        "serve": [out, "--port", "0"],
    }[command]
    with pytest.raises(SystemExit) as ended:
        cli._run([command, *arguments, "--variant", "q4"])
    root = folder / "onnx" if command == "evaluate" else result.out
    sentence = f"{root}: the decoder has no variant 'q4', only '', 'bnb4', 'int8', 'q4f16'; name one"
    assert ended.value.code == 1 and sentence in " ".join(capsys.readouterr().err.split())
