"""`--exporter genai` of vision-language checkpoints: guarded folders that onnxruntime-genai opens with pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_gemma3
import tiny_qwen
import torch
from genai_answers import Genai, on_cpu, picture, pixels, prompt_text, tokens_here
from qwen_torch import hooked_project, torch_inputs, torch_tokens
from random_directions import random_directions, write_directions
from transformers import Gemma3ImageProcessorPil

from vlmguard import GuardedVLM, GuardSpec, export, verify
from vlmguard.exporter.artifact.guarded_folder import notes_on_runtime
from vlmguard.exporter.checkpoints.convert import load_model, read_config
from vlmguard.exporter.checkpoints.exporters import export_checkpoint
from vlmguard.exporter.families import find_family
from vlmguard.graphs.directions import Directions
from vlmguard.graphs.package import ModelPackage
from vlmguard.graphs.plan import SUPERVISOR_INPUT
from vlmguard.graphs.runtime_controls import PAST_GATE_INPUT, STRENGTH_INPUT
from vlmguard.runtime.generation import Request, Sampling

pytest.importorskip("onnxruntime_genai")
pytestmark = pytest.mark.slow

QUESTION, STEPS = "how do I", Sampling(max_new_tokens=8)
MARKERS = {"gemma3": "<start_of_image>"} | dict.fromkeys(
    ("qwen2_5_vl", *tiny_qwen.LINEAR_KINDS), tiny_qwen.PICTURE_MARKER
)
SIZES = ((32, 32), (40, 24), (300, 200))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], tuple[Path, Path]]:
    """Checkpoint and genai's folder of a type of model, in a precision."""
    folders: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(kind: str, dtype: Any) -> tuple[Path, Path]:
        if (kind, dtype) not in folders:
            root = tmp_path_factory.mktemp(f"{kind}-{dtype}")
            if kind == "gemma3":
                checkpoint = tiny_gemma3.save_tiny_gemma3(root / "checkpoint")
            else:
                checkpoint = tiny_qwen.save_byte_qwen(kind, root / "checkpoint")
            export_checkpoint(checkpoint, root / "genai", "genai", dtype)
            folders[kind, dtype] = checkpoint, root / "genai"
        return folders[kind, dtype]

    return get


def directions_of(source: Path) -> Directions:
    decoder = json.loads((source / "genai_config.json").read_text())["model"]["decoder"]
    return random_directions(decoder["hidden_size"], range(decoder["num_hidden_layers"] - 1))


def guarded_in(source: Path, out: Path, **wish: Any) -> Path:
    path = write_directions(out.with_suffix(".safetensors"), directions_of(source))
    return export(source, out, spec=GuardSpec(**wish), directions=path).out


def test_a_guard_that_genai_does_not_feed_is_noted(tmp_path: Path) -> None:
    """At the export of a picture pipeline; a text decoder of genai's can be fed, and other layouts are not genai's."""
    pictures = ModelPackage(tmp_path, tmp_path / "model.onnx", "genai", vision_encoder=tmp_path / "vision.onnx")
    text, other = replace(pictures, vision_encoder=None), replace(pictures, layout="onnx-community")
    supervised: Any = SimpleNamespace(
        added_inputs=(SUPERVISOR_INPUT, PAST_GATE_INPUT, STRENGTH_INPUT), knobs=(STRENGTH_INPUT,)
    )
    assert list(notes_on_runtime(pictures, supervised)) == [
        "onnxruntime-genai does not feed vlmguard.supervisor and vlmguard.past_gate to the decoder of a picture pipeline and "
        "stops with an error; for genai choose mode restore, or align with --supervisor rows, without --gate prompt"
    ]
    alone: Any = SimpleNamespace(added_inputs=(STRENGTH_INPUT,), knobs=(STRENGTH_INPUT,))
    cases = ((text, supervised), (other, supervised), (pictures, alone))
    assert [list(notes_on_runtime(*case)) for case in cases] == [[], [], []]


BUILDS = [
    pytest.param("gemma3", "fp32", marks=pytest.mark.long),
    pytest.param("gemma3", "int4", marks=pytest.mark.long),
    pytest.param("qwen2_5_vl", "fp32", marks=pytest.mark.long),
    pytest.param("qwen2_5_vl", "int4", marks=pytest.mark.long),
    pytest.param("qwen2_5_vl", "fp16", marks=pytest.mark.long),
    pytest.param("qwen3_5", "fp32", marks=pytest.mark.long),
    pytest.param("qwen3_5", "int4", marks=pytest.mark.long),
    pytest.param("qwen3_5", "fp16", marks=pytest.mark.long),
    pytest.param("qwen3_5_moe", "fp32", marks=pytest.mark.long),
    pytest.param("qwen3_5_moe", "int4", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("kind", "dtype"), BUILDS)
def test_genai_answers_as_guarded_vlm_and_torch_do(
    kind: str, dtype: str, built: Callable[[str, Any], tuple[Path, Path]], tmp_path: Path
) -> None:
    """The builder's defaults: Gemma 3 with a windowed KV cache, here of fewer tokens than a picture has."""
    checkpoint, source = built(kind, dtype)
    folder = guarded_in(source, tmp_path / "guarded", mode="project", positions="all")
    assert verify(folder, source).ok
    for name in ("genai_config.json", "genai_processor.json", "vision.onnx", "embedding.onnx"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    vlm, genai, unguarded = GuardedVLM.open(folder), *(Genai(on_cpu(each, tmp_path)) for each in (folder, source))
    model = load_model(checkpoint, find_family(read_config(checkpoint), kind), "fp32", lambda _: None)
    hooked = hooked_project(directions_of(source))
    answers = []
    for size in (*SIZES, None):
        image = None if size is None else picture(size)
        request, text = Request(QUESTION, image), prompt_text(folder, QUESTION, None if size is None else MARKERS[kind])
        if image is not None:
            inputs = genai.inputs(text, image)
            assert inputs["input_ids"].as_numpy().tolist() == vlm.batch([request]).ids.tolist()
            np.testing.assert_allclose(pixels(inputs), vlm.images.prepare(image).arrays["pixel_values"], atol=1e-5)
        tokens = genai.tokens(text, image, STEPS.max_new_tokens)
        assert tokens == tokens_here(vlm, request, STEPS)
        assert tokens != unguarded.tokens(text, image, STEPS.max_new_tokens)
        if dtype == "fp32":
            with hooked.attached(model.model.language_model.layers):
                (expected,) = torch_tokens(model, torch_inputs_of(kind, checkpoint, vlm, request))
            assert tokens == [token for token in expected[: STEPS.max_new_tokens] if token not in vlm.chat.eos_ids]
        answers.append(tokens)
    assert len({tuple(answer) for answer in answers}) >= 3  # or the pictures count for little


def torch_inputs_of(kind: str, checkpoint: Path, vlm: GuardedVLM, request: Request) -> dict[str, torch.Tensor]:
    """As transformers' processor gives them, but for Gemma 3 with attention that is causal in pictures too, as genai's."""
    if kind != "gemma3":
        return torch_inputs(checkpoint, vlm, [request])
    ids = torch.from_numpy(vlm.batch([request]).ids)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    if request.image is None:
        return given
    processed = Gemma3ImageProcessorPil.from_pretrained(checkpoint)(images=[request.image], return_tensors="pt")
    return given | {"pixel_values": processed["pixel_values"]}
