"""Phi-4 Multimodal in onnxruntime-genai: answers with pictures as torch gives them, and what genai cannot run.

transformers' image processor for it needs torchvision, so the pictures are those that genai prepares: the vision encoder
runs on them for `GuardedVLM`, and torch gets them as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_phi4
import torch
from genai_answers import Genai, picture, prompt_text, tokens_here
from PIL import Image
from qwen_torch import hooked_project
from random_directions import random_directions, write_directions

from vlmguard import GuardedVLM, GuardSpec, export, verify
from vlmguard.exporter.checkpoints.convert import convert_checkpoint, load_model, read_config
from vlmguard.exporter.families import find_family
from vlmguard.exporter.packaging.genai import package_genai
from vlmguard.exporter.packaging.genai_pipelines import PIPELINES
from vlmguard.exporter.packaging.genai_processor import processor_bytes
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.progress import ignore_progress
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.images.image_features import ImageFeatures
from vlmguard.runtime.runners import open_runner

QUESTION, STEPS = "how do I", Sampling(max_new_tokens=6)
SIZES = ((448, 448), (300, 200), (900, 400), (500, 800))  # one tile, part of one, two beside and above one another
ARRAYS = {
    "image_pixel_values": "pixel_values",
    "image_sizes": "image_sizes",
    "image_attention_mask": "image_attention_mask",
}


@pytest.mark.long
def test_genai_answers_with_pictures_as_torch_does(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    checkpoint, source = tiny_phi4.save_tiny_phi4(tmp_path / "checkpoint"), tmp_path / "source"
    convert_checkpoint(checkpoint, source, verify=False)  # compared with torch in `make families`
    directions = random_directions(tiny_phi4.WIDTH, range(tiny_phi4.LAYERS))
    path = write_directions(tmp_path / "directions.safetensors", directions)
    guarded = export(source, tmp_path / "guarded", spec=GuardSpec(mode="project", positions="all"), directions=path).out
    folder = package_genai(guarded, tmp_path / "genai").out
    assert verify(folder, source).ok
    described = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (described["type"], described["speech"]["filename"]) == ("phi4mm", "")
    vlm, genai, packaged = GuardedVLM.open(guarded), Genai(folder), GuardedVLM.open(folder)
    encoder = open_runner(folder / "vision.onnx", folder, "onnxruntime-cpu")
    model = load_model(checkpoint, find_family(read_config(checkpoint), "phi4"), "fp32", ignore_progress)
    hooked, answers = hooked_project(directions), []
    for size in (*SIZES, None):
        given, image = _inputs(genai, folder, size)
        rows = None
        if image is not None:
            rows = ImageFeatures(encoder.run({name: given[name] for name in ARRAYS})["image_features"])
        request = Request(QUESTION, rows)
        assert given["input_ids"].tolist() == vlm.batch([request]).ids.tolist()
        with torch.no_grad(), hooked.attached(model.model.layers):
            arrays = {name: torch.from_numpy(array) for name, array in given.items()}
            (row,) = model.generate(**arrays, max_new_tokens=STEPS.max_new_tokens, do_sample=False).tolist()
        expected = [token for token in row[given["input_ids"].shape[1] :] if token not in vlm.chat.eos_ids]
        for one in (vlm, packaged):
            assert tokens_here(one, request, STEPS) == expected
        text = prompt_text(folder, QUESTION, None if image is None else "<|image_1|>")
        assert genai.tokens(text, image, STEPS.max_new_tokens) == expected
        answers.append(expected)
    assert len({tuple(answer) for answer in answers}) >= 4  # or the pictures count for little


def _inputs(
    genai: Genai, folder: Path, size: tuple[int, int] | None
) -> tuple[dict[str, np.ndarray], Image.Image | None]:
    """What genai feeds its graphs, by transformers' names, and the picture."""
    image = None if size is None else picture(size)
    inputs = genai.inputs(prompt_text(folder, QUESTION, None if image is None else "<|image_1|>"), image)
    ids = inputs["input_ids"].as_numpy().astype(np.int64)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if image is None:
        return given, None
    return given | {name: inputs[theirs].as_numpy() for name, theirs in ARRAYS.items()}, image


def test_a_model_with_other_tiles_or_tokens_than_genai_has_is_refused() -> None:
    vision: dict[str, Any] = {"crop_size": 448, "patch_size": 14, "image_token_id": 200_010}
    pipeline = PIPELINES["phi4_multimodal"]
    assert pipeline.require({"vision_config": vision}, "here") == ({"image_token_id": 200_010}, {})
    with pytest.raises(GuardError) as tiles:
        pipeline.require({"vision_config": vision | {"crop_size": 336}}, "here")
    assert str(tiles.value) == (
        "here: its tiles have 336 pixels and patches of 14, and onnxruntime-genai counts the tokens of tiles of 448 and 14; "
        "keep the layout that it has"
    )
    with pytest.raises(GuardError) as token:
        pipeline.require({"vision_config": vision | {"image_token_id": 9}}, "here")
    assert str(token.value) == (
        "here: image_token_id is 9, and onnxruntime-genai writes 200010 for every model of this type; keep the layout "
        "that it has"
    )


def test_its_image_processor_is_written_without_being_run(tmp_path: Path) -> None:
    declared = {"image_processor_type": "Phi4MultimodalImageProcessor", "dynamic_hd": 4}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(declared))
    content = json.loads(processor_bytes(tmp_path))["processor"]
    assert content["output_aligner"] == "phi4-vision-aligner"
    steps = [step["operation"] for step in content["transforms"]]
    assert [step["type"] for step in steps] == [
        "DecodeImage",
        "Phi4VisionDynamicPreprocess",
        "Rescale",
        "Normalize",
        "Phi4VisionProcessor",
    ]
    assert steps[1]["attrs"] == {"dynamic_hd": 4, "dyhd_base_resolution": 448}
    assert steps[4]["inputs"] == [":0", "step_1:1"]
