"""Six types that stand for the kinds of decoders and vision encoders, from a checkpoint to a guarded model that sees a picture.

`make families` runs all types in this way.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from families.all_types import every_row, read_rows, run_all, write_rows
from families.families_page import page
from families.one_type import TypeRow, run_type

from vlmguard.exporter.families import find_family
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.layouts import open_package

KINDS = {
    "aya_vision": "pictures of one size; attention and MLP side by side",
    "gemma4": "embeddings for each layer, sliding windows, heads of two widths",
    "lfm2_vl": "states of convolutions beside keys and values; patches with a mask",
    "llava_next_video": "tiles of a picture, packed within the graph",
    "mistral3": "pictures of any size, by the shape of their pixels",
    "qwen3_5": "linear attention by a Scan; three positions a token",
}


@pytest.mark.parametrize("model_type", KINDS)
def test_a_type_is_exported_compared_guarded_and_sees(model_type: str, tmp_path: Path) -> None:
    row = run_type(model_type, tmp_path)
    assert row.reason == "" and row.export == "generic row"
    assert row.parity is not None and 0 < row.parity <= 1e-4
    assert row.guarded and row.anatomy == "4 of 4"
    assert row.picture == "yes"
    package = open_package(tmp_path / "guarded")
    states = {pair.past.split(".")[0] for pair in package.roles.states}
    expected = {
        "qwen3_5": {"past_key_values", "past_conv", "past_recurrent"},
        "lfm2_vl": {"past_key_values", "past_conv"},
    }
    assert states == expected.get(model_type, {"past_key_values"})
    kinds = {node.op_type for node in package.load_decoder().graph}
    assert ("Scan" in kinds) == (model_type == "qwen3_5")


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
