"""Precision variants: each one answers the same prompts, has a row in result and manifest, and must be protected."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from onnxruntime.quantization import quantize_dynamic
from rich.console import Console
from tiny_vlm_paths import CALIBRATION, DECODER, PROMPTS, SOURCE, Guarded

from vlmguard import GuardedVLM, cli
from vlmguard.exporter import render
from vlmguard.exporter.export_result import ExportResult
from vlmguard.exporter.pipeline import export
from vlmguard.graphs.errors import ModelUnreadable, NoEffect
from vlmguard.graphs.manifest import read_manifest

pytest_plugins = ("tiny_vlm_fixtures",)

INT8 = "onnx/decoder_model_merged_int8.onnx"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny VLM with its decoder in float32 and with int8 weights, and prompts of its language."""
    folder = shutil.copytree(SOURCE, tmp_path_factory.mktemp("variants") / "tiny")
    shutil.copy(CALIBRATION, folder / "calibration.jsonl")
    shutil.copytree(PROMPTS / "images", folder / "images")
    quantize_dynamic(folder / DECODER, folder / INT8)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path, guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    directions = guarded("restore") / "directions.safetensors"
    return export(folder, tmp_path_factory.mktemp("out") / "out", directions=directions, mode="restore")


def test_each_variant_has_a_row(result: ExportResult) -> None:
    assert [row.decoder for row in result.variants] == [DECODER, INT8]
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


def test_a_variant_that_the_guard_does_not_change_is_refused(folder: Path, guarded: Guarded, tmp_path: Path) -> None:
    """Here because its head is all zeros: every logit is the same, whatever the guard does."""
    model = shutil.copytree(folder, tmp_path / "tiny")
    proto = onnx.load(model / DECODER)
    for tensor in proto.graph.initializer:
        if "lm_head" in tensor.name:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(np.zeros_like(onnx.numpy_helper.to_array(tensor)), tensor.name)
            )
    (model / INT8).unlink()
    dead = model / "onnx" / "decoder_model_merged_q4.onnx"
    onnx.save(proto, dead)
    with pytest.raises(NoEffect) as caught:
        export(model, tmp_path / "out", directions=guarded("restore") / "directions.safetensors", mode="restore")
    assert str(caught.value).startswith(f"onnx/{dead.name}: the guard has no effect on ")
    assert not (tmp_path / "out").exists()


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
    assert str(caught.value) == f"{result.out}: the decoder has no variant 'q4', only '', 'int8'; name one"
