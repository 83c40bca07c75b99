"""Precisions on the real-model bed: what is counted, how a refused export is shown, and that the page has the kept counts."""

import json
import shutil
from pathlib import Path

import onnx
import page
import pytest
from cells import ASKED, QUESTIONS
from onnx import TensorProto
from precisions import PRECISIONS, RESULTS, SETTINGS, decoder_of, make_precisions, row_of, table

PAGE = Path(__file__).parents[2] / "docs" / "real-model.md"
SOURCE = Path(__file__).parents[2] / "examples" / "tiny_vlm" / "onnx-community"
REFUSED = [
    [True, True, False, False],
    [False, False, False, False],
    [True, False, False, True],
]  # as text, unguarded, guarded


@pytest.fixture
def asked():
    as_text, unguarded, guarded = REFUSED
    cells = {}
    for name in ASKED:
        cells[f"{name}, text"] = {"base_refused": as_text, "guarded_refused": as_text}
        cells[f"{name}, picture"] = {"base_refused": unguarded, "guarded_refused": guarded}
        cells[f"{name}, adversarial"] = {"base_refused": unguarded, "guarded_refused": as_text}
    cells[f"{QUESTIONS}, picture"] = {"base_right": [True, True, False], "guarded_right": [True, False, False]}
    return cells


def test_a_row_counts_both_harmful_and_both_harmless_sets_in_each_setting(asked):
    asked["harmbench, adversarial"]["guarded_refused"] = [True, True, True, True]
    shapes = {"count": 8, "text": 4, "unguarded": 0, "guarded": 4}
    assert row_of(asked, SETTINGS) == {
        "settings": {
            "picture": {"harmful": shapes, "harmless": shapes},
            "adversarial": {"harmful": {**shapes, "guarded": 6}, "harmless": shapes},
        },
        "questions": {"count": 3, "unguarded": 2, "guarded": 1},
    }
    assert list(row_of(asked, ["picture"])["settings"]) == ["picture"]


def test_the_page_has_a_row_per_precision_and_keeps_other_sections(asked, tmp_path):
    rows = [
        {"precision": "float32", "bytes": 2 << 20} | row_of(asked, SETTINGS),
        {"precision": "int8", "bytes": 1 << 20, "refused_export": "it removes safety"},
    ]
    machine = {"cores": 2, "processor": "a cpu", "libraries": {"onnxruntime": "1"}}
    plan = {"mode": "align", "layers": [6, 7], "rank": 8}
    result = {"seed": 4, "reduced": True, "tower_steps": 9, "prompts": 4, "plan": plan, "machine": machine}
    result["precisions"] = rows
    lines = table(rows)
    assert lines[2:] == [
        "| float32 | 2 | picture | 4 of 8 | 0 | 4 | 4 of 8 | 0 | 4 | 2 of 3 | 1 |",
        "| float32 | 2 | adversarial | 4 of 8 | 0 | 4 | 4 of 8 | 0 | 4 |  |  |",
        "| int8 | 1 | the export was refused: it removes safety |" + " |" * 8,
    ]
    assert {line.count("|") for line in lines} == {12}
    target = tmp_path / "page.md"
    page.write_page([{"seed": 3, "tradeoff": {"harmbench": {"text": [True]}}}], target)
    page.write_page([result], target)
    before = target.read_text()
    assert before.index("## Seed 3: layers") < before.index("## Seed 4: precisions of the decoder")
    assert (
        "4 prompts of each set, as text and beside held-out pictures of shapes, and beside adversarial ones: " in before
    )
    assert (
        "8 about held-out pictures. Measured on the reduced bed of `build.py --quick`, whose tower was trained"
        in before
    )
    page.write_page([result | {"reduced": False}], target)
    assert "reduced" not in target.read_text().split("## Limits")[0]
    page.write_page([result], target)
    assert target.read_text() == before


def test_the_page_is_made_of_the_kept_counts():
    section = "\n".join(page.sections(json.loads(RESULTS.read_text())))
    assert section in PAGE.read_text()


def test_every_precision_has_a_decoder_beside_the_plain_one(tmp_path):
    plain = shutil.copytree(SOURCE, tmp_path / "plain")  # hard links need one file system
    make_precisions(plain, tmp_path)
    model = tmp_path / "model"
    kinds = {name: {tensor.data_type for tensor in initializers(decoder_of(model, name))} for name in PRECISIONS}
    assert TensorProto.FLOAT16 in kinds["w16a32"] - kinds[""]
    assert TensorProto.INT8 in kinds["int8"] - kinds[""]
    assert all(TensorProto.UINT8 in kinds[name] - kinds[""] for name in ("q8", "q4"))
    assert decoder_of(model, "q4").with_name("decoder_model_merged_q4.onnx.data").stat().st_size < (
        0.6 * decoder_of(model, "q8").with_name("decoder_model_merged_q8.onnx.data").stat().st_size
    )
    assert all(decoder_of(model, name).parent.samefile(model / "onnx") for name in PRECISIONS)
    names = {
        name: sorted(tensor.name for tensor in onnx.load(decoder_of(model, name)).graph.input) for name in PRECISIONS
    }
    assert len({tuple(inputs) for inputs in names.values()}) == 1


def initializers(path):
    return onnx.load(path, load_external_data=False).graph.initializer
