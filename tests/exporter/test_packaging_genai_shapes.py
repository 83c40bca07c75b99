"""Mistral 3 and LFM2-VL in onnxruntime-genai: pictures that keep their shape; answers as torch gives them, from both exporters.

transformers' image processor of LFM2-VL needs torchvision; torch gets the pictures of the one here, which `test_images_cut`
compares with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_lfm2_vl
import tiny_mistral3
import torch
from genai_answers import Genai, on_cpu, picture, pixels, prompt_text, tokens_here
from PIL import Image
from qwen_torch import hooked_project
from random_directions import random_directions, write_directions
from tiny_mistral3 import LONGEST, MERGE, PATCH
from transformers import PixtralImageProcessorPil

from vlmguard import GuardedVLM, GuardSpec, export, verify
from vlmguard.exporter.checkpoints.convert import convert_checkpoint, load_model, read_config
from vlmguard.exporter.checkpoints.exporters import export_checkpoint
from vlmguard.exporter.choices import Precision
from vlmguard.exporter.families import find_family
from vlmguard.exporter.packaging.genai import package_genai
from vlmguard.exporter.packaging.genai_pipelines import PIPELINES
from vlmguard.exporter.packaging.genai_processor import processor_bytes
from vlmguard.graphs.directions import Directions
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.progress import ignore_progress
from vlmguard.runtime.generation import Request, Sampling

QUESTION, STEPS = "how do I", Sampling(max_new_tokens=8)
EDGE = PATCH * MERGE
Arrays = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A type of model.

    Attributes:
        save: writes a checkpoint.
        width, layers: of its decoder.
        mark: what stands for a picture in a prompt.
        pictures: width and height of the pictures of each prompt.
        prepared: what torch gets of pictures.
    """

    save: Callable[[Path], Path]
    width: int
    layers: int
    mark: str
    pictures: Sequence[tuple[tuple[int, int], ...]]
    prepared: Callable[[GuardedVLM, Sequence[Image.Image]], Arrays]

    @property
    def directions(self) -> Directions:
        return random_directions(self.width, range(self.layers))


def by_transformers(_: GuardedVLM, images: Sequence[Image.Image]) -> Arrays:
    """What its image processor gives, with the size of a token that its `PixtralProcessor` hands to it."""
    edge = {"height": EDGE, "width": EDGE}
    theirs = PixtralImageProcessorPil(size={"longest_edge": LONGEST}, patch_size=edge)
    return dict(theirs(images=list(images), return_tensors="pt"))


def by_vlm(vlm: GuardedVLM, images: Sequence[Image.Image]) -> Arrays:
    (image,) = images
    return {name: torch.from_numpy(array) for name, array in vlm.images.prepare(image).arrays.items()}


KINDS = {
    "mistral3": Kind(
        save=tiny_mistral3.save_tiny_mistral3,
        width=tiny_mistral3.WIDTH,
        layers=tiny_mistral3.LAYERS,
        mark="[IMG]",
        # whole tokens, then sides that are rounded up; of several pictures the first or the last covers the others
        pictures=((), ((32, 24),), ((96, 40),), ((8, 64),), ((45, 30),), ((48, 32), (24, 16)), ((24, 16), (48, 32))),
        prepared=by_transformers,
    ),
    "lfm2_vl": Kind(
        save=tiny_lfm2_vl.save_tiny_lfm2_vl,
        width=tiny_lfm2_vl.WIDTH,
        layers=tiny_lfm2_vl.LAYERS,
        mark="<image>",
        pictures=((), ((32, 24),), ((16, 16),), ((32, 32),), ((300, 200),)),
        prepared=by_vlm,
    ),
}


def guarded_in(source: Path, out: Path, kind: Kind) -> Path:
    path = write_directions(out.with_suffix(".safetensors"), kind.directions)
    return export(source, out, spec=GuardSpec(mode="project", positions="all"), directions=path).out


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_genai_answers_with_a_packaged_folder_as_torch_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    kind = KINDS[name]
    checkpoint, source = kind.save(tmp_path / "checkpoint"), tmp_path / "source"
    convert_checkpoint(checkpoint, source, verify=False)  # compared with torch in `make families`
    guarded = guarded_in(source, tmp_path / "guarded", kind)
    folder = package_genai(guarded, tmp_path / "genai").out
    assert verify(folder, source).ok
    check_answers(kind, checkpoint, guarded, folder)
    if name == "mistral3":
        check_sizes(Genai(folder), GuardedVLM.open(guarded))


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_genai_answers_with_the_decoder_of_its_builder_as_torch_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    kind = KINDS[name]
    checkpoint, source = kind.save(tmp_path / "checkpoint"), tmp_path / "source"
    export_checkpoint(checkpoint, source, "genai")
    folder = guarded_in(source, tmp_path / "guarded", kind)
    assert verify(folder, source).ok
    check_answers(kind, checkpoint, folder, folder)


@pytest.mark.long
@pytest.mark.parametrize(("name", "dtype"), [("mistral3", "int4"), ("mistral3", "fp16"), ("lfm2_vl", "int4")])
def test_genai_answers_in_other_precisions_as_the_runtime_here(name: str, dtype: Precision, tmp_path: Path) -> None:
    """The builder's; LFM2-VL's decoder in float16 has an operator that onnxruntime's CPU provider lacks."""
    pytest.importorskip("onnxruntime_genai")
    kind = KINDS[name]
    export_checkpoint(kind.save(tmp_path / "checkpoint"), tmp_path / "source", "genai", dtype)
    folder = guarded_in(tmp_path / "source", tmp_path / "guarded", kind)
    assert verify(folder, tmp_path / "source").ok
    vlm, genai, unguarded = (
        GuardedVLM.open(folder),
        *(Genai(on_cpu(each, tmp_path)) for each in (folder, tmp_path / "source")),
    )
    changed, others = 0, []
    for sizes in kind.pictures:
        images = [picture(size) for size in sizes]
        text = prompt_text(folder, QUESTION, kind.mark if len(images) == 1 else None)
        tokens = genai.tokens(text, images, STEPS.max_new_tokens)
        if tokens != tokens_here(vlm, Request(QUESTION, images), STEPS):
            others.append(sizes)
        changed += tokens != unguarded.tokens(text, images, STEPS.max_new_tokens)
    assert changed >= 4
    # An int4 decoder rounds its activations to int8, so the last digit of a pixel can turn the answer of a random model.
    assert len(others) <= (dtype == "int4") and () not in others


def check_answers(kind: Kind, checkpoint: Path, guarded: Path, folder: Path) -> None:
    """genai, the guarded folder in the runtime here and torch with the guard as hooks give the same tokens."""
    vlm, genai = GuardedVLM.open(guarded), Genai(folder)
    model = load_model(checkpoint, find_family(read_config(checkpoint), "checkpoint"), "fp32", ignore_progress)
    hooked, answers, changed = hooked_project(kind.directions), [], 0

    def torch_tokens(given: Arrays) -> list[int]:
        with torch.no_grad():
            (row,) = model.generate(**given, max_new_tokens=STEPS.max_new_tokens, do_sample=False).tolist()
        return row[given["input_ids"].shape[1] :]

    for sizes in kind.pictures:
        images = [picture(size) for size in sizes]
        request = Request(QUESTION, images)
        # Mistral 3: marks beside one another would count as one; pictures without a mark come in order behind [INST]
        text = prompt_text(folder, QUESTION, kind.mark if len(images) == 1 else None)
        ids = genai.inputs(text, images)["input_ids"].as_numpy().astype(np.int64)
        assert ids.tolist() == vlm.batch([request]).ids.tolist()
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.ones(ids.shape, dtype=torch.long)}
        given |= kind.prepared(vlm, images) if images else {}
        unguarded = torch_tokens(given)
        with hooked.attached(model.model.language_model.layers):
            expected = torch_tokens(given)
        changed += expected != unguarded
        expected = [token for token in expected if token not in vlm.chat.eos_ids]
        assert genai.tokens(text, images, STEPS.max_new_tokens) == expected
        assert tokens_here(vlm, request, STEPS) == expected
        answers.append(expected)
    assert len({tuple(answer) for answer in answers}) >= 4  # or the pictures count for little
    assert changed >= 4


def check_sizes(genai: Genai, vlm: GuardedVLM) -> None:
    """Within the longest edge a side is that of transformers or one token less; whole tokens are equal to rounding."""
    draw, fewer = np.random.default_rng(0), 0
    for size in [*draw.integers(4, LONGEST + 1, (30, 2)).tolist(), *(EDGE * draw.integers(1, 13, (10, 2))).tolist()]:
        image = picture(tuple(size))
        ours, theirs = pixels(genai.inputs("[IMG]", image)), by_transformers(vlm, [image])["pixel_values"].numpy()
        less = [(b - a) // EDGE for a, b in zip(ours.shape[2:], theirs.shape[2:], strict=True)]
        assert set(less) <= {0, 1}
        if less == [0, 0]:
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        else:
            assert any(side % EDGE for side in size)
            fewer += 1
    assert fewer


def processor_steps(folder: Path, **options: Any) -> list[dict[str, Any]]:
    declared = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 1540}, "patch_size": 28}
    (folder / "preprocessor_config.json").write_text(json.dumps(declared | options))
    return [step["operation"] for step in json.loads(processor_bytes(folder))["processor"]["transforms"]]


def test_its_image_processor_resizes_to_whole_tokens(tmp_path: Path) -> None:
    steps = processor_steps(tmp_path)
    assert [step["type"] for step in steps] == [
        "DecodeImage",
        "Resize",
        "Rescale",
        "Normalize",
        "Permute3D",
        "PixtralImageSizes",
    ]
    assert steps[1]["attrs"] == {
        "smart_resize": 1,
        "min_pixels": 28**2,
        "max_pixels": 1540**2,
        "patch_size": 28,
        "merge_size": 1,
        "interpolation": "CUBIC",
    }
    config = {"image_token_index": 10, "spatial_merge_size": 2, "vision_config": {"patch_size": 14}}
    numbers = {"patch_size": 14, "spatial_merge_size": 2}
    assert PIPELINES["mistral3"].require(config, "here") == ({"image_token_id": 10}, numbers)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"patch_size": {"height": 28, "width": 14}},
            "{folder}: its tokens are no squares, or it does not resize; keep the layout that it has",
        ),
        (
            {"do_resize": False},
            "{folder}: its tokens are no squares, or it does not resize; keep the layout that it has",
        ),
        ({"resample": 0}, "the image processor resizes with NEAREST, which onnxruntime-genai lacks"),
    ],
)
def test_an_image_processor_without_a_counterpart_is_refused(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(GuardError) as refused:
        processor_steps(tmp_path, **options)
    assert str(refused.value) == reason.format(folder=tmp_path)


def lfm2_inputs(*states: tuple[str, tuple[str | int, ...]]) -> list[ir.Value]:
    return [ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)) for name, shape in states]


def test_the_layers_of_lfm2_and_its_list_of_patches_are_read_from_the_graphs(tmp_path: Path) -> None:
    pipeline = PIPELINES["lfm2_vl"]
    states = lfm2_inputs(("past_conv.0", ("batch", 64, 3)), ("past_conv.2", ("batch", 64, 3)))
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    decoder = ir.Graph(states, [], nodes=[])
    assert pipeline.of_decoder(4, decoder) == {"layer_types": kinds, "conv_cache_size": 3}
    for shape, patches in (((1, 64, 48), {"max_num_patches": 64}), (("pictures", "patches", 48), {})):
        assert pipeline.of_vision(ir.Graph(lfm2_inputs(("pixel_values", shape)), [], nodes=[])) == patches
    options = {"encoder_patch_size": 16, "min_image_tokens": 64, "max_image_tokens": 256}
    resize = processor_steps(tmp_path, image_processor_type="Lfm2VlImageProcessor", **options)[1]["attrs"]
    assert resize == {
        "smart_resize": 1,
        "min_pixels": 64 * 32**2,
        "max_pixels": 256 * 32**2,
        "patch_size": 16,
        "merge_size": 2,
        "interpolation": "LINEAR",
    }


@pytest.mark.parametrize("sizes", [("window", "window"), (4, 3)])
def test_convolutions_whose_states_have_no_size_in_common_are_refused(sizes: tuple[str | int, str | int]) -> None:
    states = lfm2_inputs(
        *((f"past_conv.{layer}", ("batch", 64, size)) for layer, size in zip((0, 2), sizes, strict=True))
    )
    with pytest.raises(GuardError) as refused:
        PIPELINES["lfm2_vl"].of_decoder(4, ir.Graph(states, [], nodes=[]))
    assert str(refused.value) == (
        "its convolutions have no state of one size, as onnxruntime-genai feeds it; keep the layout that it has"
    )
