"""A guarded folder laid out anew for onnxruntime-genai and for transformers.js: same graphs, same tokens, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from random_directions import random_directions, write_directions
from small_guarded import make_the_manifest_fit
from tiny_vlm_paths import Guarded

from vlmguard import GuardedVLM, GuardSpec, export, verify
from vlmguard.exporter.packaging.genai import package_genai
from vlmguard.exporter.packaging.onnx_community import package_onnx_community
from vlmguard.graphs.errors import GuardError
from vlmguard.runtime.generation import Request, Sampling

pytest_plugins = ("tiny_vlm_fixtures", "zoo_fixtures")

PROMPT, STEPS = "how to wash the boat", 8
# Its gate is always open: every step is edited, and other tokens come than without a guard.
OPEN = {"mode": "restore", "tau": -100.0}


@pytest.fixture(scope="module")
def text_model(zoo: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text decoder in genai's layout, its weights outside the graph: unguarded, guarded."""
    root = tmp_path_factory.mktemp("text")
    source = zoo("llama-genai-fp32").folder
    return source, guard(source, root / "guarded")


def guard(source: Path, out: Path, **wish: Any) -> Path:
    directions = write_directions(out.with_suffix(".safetensors"), random_directions(64, [1, 2]))
    return export(source, out, spec=GuardSpec(**(wish or OPEN)), directions=directions).out


def tokens(folder: Path) -> list[int | None]:
    steps = GuardedVLM.open(folder).steps([Request(PROMPT)], Sampling(max_new_tokens=STEPS))
    return [step.tokens[0] for step in steps]


def genai_tokens(folder: Path) -> list[int]:
    og = pytest.importorskip("onnxruntime_genai")
    ids = GuardedVLM.open(folder).chat.encode(PROMPT)
    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=len(ids) + STEPS, do_sample=False)
    generator = og.Generator(model, options)
    generator.append_tokens(np.array([ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(ids) :]


@pytest.mark.slow
def test_from_genai_to_onnx_community_and_back(text_model: tuple[Path, Path], tmp_path: Path) -> None:
    source, guarded = text_model
    here = package_onnx_community(guarded, tmp_path / "community").out
    assert tokens(here) == tokens(guarded)
    assert verify(here, source).ok  # without its guard it is the source, whatever its files are called
    assert sorted(path.name for path in (here / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    config = json.loads((here / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {"model.onnx": 1}}
    assert (config["model_type"], config["num_key_value_heads"]) == ("llama", 2)

    unguarded = tmp_path / "unguarded"
    shutil.copytree(here, unguarded, ignore=shutil.ignore_patterns("guard.json", "*.safetensors", "onnx"))
    (unguarded / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy2(source / name, unguarded / "onnx")
    there = package_genai(guard(unguarded, tmp_path / "again"), tmp_path / "genai").out
    assert verify(there, unguarded).ok
    assert genai_tokens(there) == tokens(there) == tokens(guarded) == genai_tokens(guarded)


def test_a_signature_is_left_out_and_said(text_model: tuple[Path, Path], tmp_path: Path) -> None:
    signed = Path(shutil.copytree(text_model[1], tmp_path / "signed"))
    (signed / "model.sig").write_text("{}")
    result = package_onnx_community(signed, tmp_path / "out")
    assert not (result.out / "model.sig").exists()
    assert result.notes == (
        "left out, this layout has no use for them: genai_config.json",
        "the signature covers the old folder and was left out; sign the new one with `vlmguard sign`",
    )


def test_external_data_may_be_called_by_another_name_of_its_path(text_model: tuple[Path, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(text_model[0], tmp_path / "source"))
    model = onnx.load(source / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"./{entry.value}"
    onnx.save(model, source / "model.onnx")
    guarded = guard(source, tmp_path / "guarded")
    assert tokens(package_onnx_community(guarded, tmp_path / "out").out) == tokens(guarded)


def test_changed_weights_are_found(text_model: tuple[Path, Path], tmp_path: Path) -> None:
    """Data that was renamed is compared by content, not by name."""
    out = package_onnx_community(text_model[1], tmp_path / "out", data="copy").out
    data = out / "onnx" / "model.onnx_data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    make_the_manifest_fit(out)
    failed = [check.name for check in verify(out, text_model[0]).checks if not check.ok]
    assert failed == [
        "without its guard it is the source, node for node",
        "untouched initializers identical",
        "external weights are the source's files",
    ]


def test_what_a_runtime_would_not_feed_is_refused(guarded: Guarded, text_model: Any, tmp_path: Path) -> None:
    out, source = tmp_path / "out", text_model[0]
    supervised = guard(source, tmp_path / "supervised", mode="supervise", tau=0.0)
    vlm, genai = guarded("restore"), text_model[1]
    for package, folder, sentence in (
        (package_genai, genai, f"{genai}: has the genai layout already; use it as it is"),
        (package_onnx_community, vlm, f"{vlm}: has the onnx-community layout already; use it as it is"),
        (
            package_genai,
            vlm,
            f"{vlm}: is of type llava, with which onnxruntime-genai cannot be given pictures here, only gemma3, "
            "lfm2_vl, mistral3, phi4_multimodal, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe; keep the "
            "layout that it has",
        ),
        (
            package_onnx_community,
            supervised,
            f"{supervised / 'model.onnx'}: takes 'vlmguard.supervisor', which transformers.js does not feed: modes "
            "supervise and combined need a text-only pass before each answer; export in mode restore",
        ),
    ):
        with pytest.raises(GuardError) as refused:
            package(folder, out)
        assert str(refused.value) == sentence
        assert not out.exists()
