"""Six types that stand for the kinds of decoders and vision encoders, from a checkpoint to a guarded model that sees a picture.

`make families` runs all types in this way.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from families.all_types import every_row, read_rows, run_all, write_rows
from families.families_page import page
from families.one_type import TypeRow, run_type
from families.shipped_types import SHIPPED_BY
from families.small_checkpoint import types
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import vlmguard
from vlmguard.exporter.families import find_family
from vlmguard.graphs.errors import AnatomyNotFound, GuardError
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.spec import GuardSpec

KINDS = {
    "aya_vision": "pictures of one size; attention and MLP side by side",
    "gemma4": "embeddings for each layer, sliding windows, heads of two widths",
    "lfm2_vl": "states of convolutions beside keys and values; patches with a mask",
    "llava_next_video": "tiles of a picture, packed within the graph",
    "mistral3": "pictures of any size, by the shape of their pixels",
    "qwen3_5": "linear attention by a Scan; three positions a token",
}
SELDOM = ("llava_next_video", "mistral3")  # what is special about them is their vision encoder's alone


Ran = Callable[[str], tuple[TypeRow, Path]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Runs a type when first asked for it: its row, and the folder with checkpoint, model and guarded model."""

    @functools.cache
    def run(model_type: str) -> tuple[TypeRow, Path]:
        folder = tmp_path_factory.mktemp(model_type)
        return run_type(model_type, folder), folder

    return run


@pytest.mark.parametrize(
    "model_type", [pytest.param(kind, marks=pytest.mark.long if kind in SELDOM else ()) for kind in KINDS]
)
def test_a_type_is_exported_compared_guarded_and_sees(model_type: str, ran: Ran) -> None:
    row, folder = ran(model_type)
    assert row.reason == "" and row.export == "generic row"
    assert row.parity is not None and 0 < row.parity <= 1e-4
    assert row.guarded and row.anatomy == "4 of 4"
    assert row.picture == "yes"
    package = open_package(folder / "guarded")
    states = {pair.past.split(".")[0] for pair in package.roles.states}
    expected = {
        "qwen3_5": {"past_key_values", "past_conv", "past_recurrent"},
        "lfm2_vl": {"past_key_values", "past_conv"},
    }
    assert states == expected.get(model_type, {"past_key_values"})
    kinds = {node.op_type for node in package.load_decoder().graph}
    assert ("Scan" in kinds) == (model_type == "qwen3_5")


def test_every_precision_is_asked_with_the_embeddings_for_each_layer(ran: Ran) -> None:
    _, folder = ran("gemma4")
    model = folder / "model"
    plain = model / "onnx" / "decoder_model_merged.onnx"
    q4 = plain.with_name("decoder_model_merged_q4.onnx")
    quantizer = MatMulNBitsQuantizer(onnx.load(plain), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, q4)
    assert "per_layer_inputs" in [value.name for value in onnx.load(q4).graph.input]
    texts = {"harmful": ("how do I make a cake", "help bake it"), "harmless": ("describe the picture", "what is in it")}
    rows = [
        {"id": f"{label} {number} {setting}", "prompt": text, "label": label, "setting": setting}
        for label, both in texts.items()
        for number, text in enumerate(both)
        for setting in ("text", "blank")
    ]
    (model / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = GuardSpec(mode="project", layers=(2,), rank=1, positions="all")
    result = vlmguard.export(model, folder / "variants", spec=spec, directions=folder / "d.safetensors")
    assert [row.decoder for row in result.variants] == [f"onnx/{path.name}" for path in (plain, q4)]
    for row in result.variants:
        assert {(s.setting, s.asked, s.changed) for s in row.harmful.settings} == {("text", 2, 2), ("blank", 2, 2)}
    assert vlmguard.verify(result.out, model).ok
    answers = [
        vlmguard.GuardedVLM.open(result.out, variant=name).generate("what is in the picture", max_new_tokens=2)
        for name in ("", "q4")
    ]
    assert all(isinstance(answer, str) for answer in answers)


def test_activations_that_share_one_scale_are_no_embeddings_of_a_token(ran: Ran, tmp_path: Path) -> None:
    """Dynamic quantization finds one scale for all tokens, so what enters each layer is not computed from one token alone."""
    _, folder = ran("gemma4")
    model = shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*_q4.onnx"))
    plain = model / "onnx" / "decoder_model_merged.onnx"
    int8 = plain.with_name("decoder_model_merged_int8.onnx")
    quantize_dynamic(plain, int8)
    with pytest.raises(AnatomyNotFound) as refused:
        vlmguard.inspect(model, "int8")
    message = str(refused.value)
    assert message.startswith(f"{int8}: ") and "DynamicQuantizeLinear" in message and "\n" not in message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "florence2", "is_encoder_decoder": True}, "florence2 is an encoder-decoder; "),
        ({"model_type": "blip"}, "BlipForConditionalGeneration does not generate from embeddings; "),
    ],
)
def test_what_has_no_decoder_is_refused_by_its_config(config: dict[str, object], reason: str) -> None:
    with pytest.raises(GuardError) as refused:
        find_family(config, "here")
    assert str(refused.value) == (
        f"here: {reason}only decoder-only language models can be guarded. Export it to ONNX with its own tools and guard that "
        "folder instead"
    )


def test_a_stopped_run_goes_on_and_the_page_keeps_every_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, progress, asked = tmp_path / "results.jsonl", tmp_path / "progress.jsonl", []
    done = TypeRow("first", "5.23.0", "generic row", 1e-6, "4 of 4", "6 checks", True, "yes")
    refused = TypeRow("second", "5.23.0", reason="its decoder | is <odd>")
    write_rows(results, [refused, TypeRow("first", reason="an older row"), TypeRow("third", "5.22.0"), done])
    write_rows(progress, [done])
    module = sys.modules["families.all_types"]
    monkeypatch.setattr(module, "run_in_process", lambda name: asked.append(name) or refused)
    run_all(results, ["first", "second"], progress)
    assert asked == ["second"] and {row.type for row in read_rows(progress)} == {"first", "second"}
    assert [row.type for row in read_rows(results)] == ["first", "second", "third"]
    run_all(results, ["second"])  # named: run again
    assert asked == ["second"] * 2
    assert [row.type for row in every_row(results, ["first", "fourth"])][-1] == "fourth"
    write_rows(results, read_rows(results)[:2])
    text = page(read_rows(results))
    assert (
        "2 types (transformers 5.23.0): 1 exported with parity, guarded and verified, 1 of them with a picture." in text
    )
    assert "| first | generic row | 1e-06 | 4 of 4 | 6 checks, verified | yes |" in text
    assert "| second | - | - | its decoder \\| is &lt;odd> |" in text


def test_the_page_counts_the_types_that_runtimes_ship() -> None:
    guarded = TypeRow("gemma3", "5.23.0", "own row", 1e-6, "4 of 4", "6 checks", True, "yes")
    refused, unshipped = TypeRow("florence2", reason="no decoder"), TypeRow("emu3", reason="differs")
    text = page([guarded, refused, unshipped])
    assert "2 types, 1 of them guarded." in text
    assert "| gemma3 | transformers.js, onnxruntime-genai, OpenVINO | yes |" in text
    assert "| florence2 | transformers.js | no |" in text and "| emu3 |  |" not in text


def test_shipped_types_are_types_of_transformers() -> None:
    assert {name for names in SHIPPED_BY.values() for name in names} <= set(types())
