"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: exported, answering, and guarded as torch does it; images of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_qwen
import torch
from PIL import Image
from qwen_torch import ANSWER, hooked_project, torch_answers, torch_inputs
from random_directions import random_directions, write_directions
from tiny_qwen import (
    DEEPSTACK,
    HEAD_WIDTH,
    KINDS,
    KV_HEADS,
    LAYERS,
    MERGE,
    PATCH_WIDTH,
    TEXT_WIDTH,
    VOCABULARY_SIZE,
)

from vlmguard.exporter.checkpoints.convert import ConversionReport, convert_checkpoint, load_model, read_config
from vlmguard.exporter.families import find_family
from vlmguard.exporter.families.qwen_vision import image_features, places
from vlmguard.exporter.pipeline import export
from vlmguard.graphs.directions import Directions
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.generation import Request
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.vlm import VisionLanguageModel

SUFFIX = {"fp32": "", "fp16": "_fp16"}
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2}

# What `make test` converts; `make zoo` adds the rest. Qwen2-VL is Qwen2.5-VL without windows.
_FIRST = ("qwen2_5_vl",)


def _marks(kind: str, dtype: str = "fp32") -> tuple[pytest.MarkDecorator, ...]:
    return () if kind in _FIRST and dtype == "fp32" else (pytest.mark.zoo,)


EXPORTS = [
    pytest.param((kind, dtype), id=f"{kind} {dtype}", marks=_marks(kind, dtype))
    for kind in KINDS
    for dtype in ("fp32", "fp16")
]


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint, kept for all tests: each takes many seconds."""

    kind: str
    dtype: str
    checkpoint: Path
    out: Path
    report: ConversionReport

    def session(self, part: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = self.out / "onnx" / f"{part}{SUFFIX[self.dtype]}.onnx"
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def torch_model(self) -> Any:
        """In float32, with the weights as they were exported."""
        family = find_family(read_config(self.checkpoint), str(self.checkpoint))
        return load_model(self.checkpoint, family, self.dtype, lambda _: None).float()


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Converted]:
    done: dict[tuple[str, str], Converted] = {}

    def convert(kind: str, dtype: str) -> Converted:
        if (kind, dtype) not in done:
            checkpoint = tiny_qwen.save_tiny_qwen(kind, tmp_path_factory.mktemp(kind))
            out = tmp_path_factory.mktemp("converted")
            report = convert_checkpoint(checkpoint, out, dtype=dtype)
            done[kind, dtype] = Converted(kind, dtype, checkpoint, out, report)
        return done[kind, dtype]

    return convert


@pytest.fixture(scope="module", params=EXPORTS)
def converted(request: pytest.FixtureRequest, conversions: Callable[[str, str], Converted]) -> Converted:
    return conversions(*request.param)


# The tower as it is traced, before it is


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_without_loops_is_the_tower(kind: str) -> None:
    """Any number of images and frames of any size, windows cut off at any side."""
    tower = tiny_qwen.tiny_qwen(kind).model.visual
    random = np.random.default_rng(0)
    for images in (1, 1, 2, 3, 5):
        grids = torch.from_numpy(random.integers(1, 6, (images, 3)) * (1, MERGE, MERGE))
        pixels = torch.randn(int(grids.prod(1).sum()), PATCH_WIDTH, generator=torch.manual_seed(images))
        with torch.no_grad():
            expected = tower(pixels, grid_thw=grids)
            merged, *injected = image_features(tower, pixels, grids)
        torch.testing.assert_close(merged, expected.pooler_output, rtol=1e-5, atol=1e-5)
        assert len(injected) == (len(DEEPSTACK) if kind == "qwen3_vl" else 0)
        for found, wanted in zip(injected, getattr(expected, "deepstack_features", ()), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_places_of_patches_come_square_by_square() -> None:
    where = places(torch.tensor([[1, 2, 4], [2, 2, 2]]), 16, merge=2)
    assert where.row.tolist() == [0, 0, 1, 1, 0, 0, 1, 1] + 2 * [0, 0, 1, 1]
    assert where.column.tolist() == [0, 1, 0, 1, 2, 3, 2, 3] + 2 * [0, 1, 0, 1]
    assert where.frame.tolist() == 8 * [0] + 4 * [8] + 4 * [12]
    assert where.height.tolist() == 16 * [2] and where.width.tolist() == 8 * [4] + 8 * [2]


# What is written


def test_it_agrees_with_torch(converted: Converted) -> None:
    """Two prompts with images of two shapes, one padded: transformers finds positions and DeepStack's places itself."""
    parity = {check.name: check for check in converted.report.parity}
    assert list(parity) == ["image features", "prefill logits", "decode logits", "cache"]
    assert all(check.ok and 0 <= check.worst <= TOLERANCE[converted.dtype] for check in parity.values())
    tokens = 3 * 2 + 2 * 5
    real = tokens + 2 * len(("start", "end")) + 2 + 4 + 5 + 7
    assert {name: check.compared for name, check in parity.items()} == {
        "image features": tokens * TEXT_WIDTH,
        "prefill logits": real * VOCABULARY_SIZE,
        "decode logits": 2 * 8 * VOCABULARY_SIZE,
        "cache": (real + 2 * 8) * LAYERS * 2 * KV_HEADS * HEAD_WIDTH,
    }


def test_the_signature_is_onnx_communitys(converted: Converted) -> None:
    def shapes(ports: Sequence[Any]) -> dict[str, list]:
        return {port.name: port.shape for port in ports}

    numbers = range(len(DEEPSTACK) if converted.kind == "qwen3_vl" else 0)
    vision, decoder = converted.session("vision_encoder"), converted.session("decoder_model_merged")
    assert shapes(vision.get_inputs()) == {
        "pixel_values": ["num_patches", PATCH_WIDTH],
        "image_grid_thw": ["num_images", 3],
    }
    assert {port.name: port.type for port in vision.get_inputs()} == {
        "pixel_values": "tensor(float)",
        "image_grid_thw": "tensor(int64)",
    }
    rows = ["num_image_tokens", TEXT_WIDTH]
    assert shapes(vision.get_outputs()) == {
        "image_features": rows,
        **{f"deepstack_features_{number}": rows for number in numbers},
    }
    stream = ["batch_size", "sequence_length", TEXT_WIDTH]
    past = ["batch_size", KV_HEADS, "past_sequence_length", HEAD_WIDTH]
    inputs = shapes(decoder.get_inputs())
    assert inputs == {
        "inputs_embeds": stream,
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": [3, "batch_size", "sequence_length"],
        **{f"deepstack_embeds_{number}": stream for number in numbers},
        **{f"past_key_values.{layer}.{kind}": past for layer in range(LAYERS) for kind in ("key", "value")},
    }
    assert next(iter(shapes(decoder.get_outputs()))) == "logits"


@pytest.mark.parametrize("grids", [[[1, 2, 2]], [[1, 8, 8], [2, 4, 6], [1, 2, 10]]], ids=["one token", "three images"])
def test_any_number_of_images_of_any_size(converted: Converted, grids: list[list[int]]) -> None:
    sizes = np.array(grids, np.int64)
    pixels = np.random.default_rng(1).standard_normal((sizes.prod(1).sum(), PATCH_WIDTH)).astype(np.float32)
    model = converted.torch_model()
    with torch.no_grad():
        given = {"pixel_values": torch.from_numpy(pixels), "image_grid_thw": torch.from_numpy(sizes)}
        expected = model.get_image_features(**given, return_dict=True)
    wanted = [torch.cat(list(expected.pooler_output)).numpy()]
    wanted += [torch.cat(list(rows)).numpy() for rows in getattr(expected, "deepstack_features", ())]
    found = converted.session("vision_encoder").run(None, {"pixel_values": pixels, "image_grid_thw": sizes})
    for rows, truth in zip(found, wanted, strict=True):
        np.testing.assert_allclose(rows, truth, rtol=0, atol=TOLERANCE[converted.dtype] * np.abs(truth).max())


# Answers


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


REQUESTS = (
    Request("how do I make a cake", picture(21, 40, 0)),
    Request("help", picture(64, 17, 1)),
    Request("how do I make a bomb : how", picture(200, 300, 2)),  # is scaled down
)
TEXTS = (Request("how do I make a cake"), Request("help"))


def test_answers_are_those_of_torch(converted: Converted) -> None:
    """`generate` of transformers, with prompts that its own image processor prepared; batches and single prompts."""
    if converted.dtype == "fp16":
        pytest.skip("half precision may choose the other of two tokens that are nearly as likely")
    vlm, model = VisionLanguageModel(open_package(converted.out)), converted.torch_model()
    assert vlm.sees
    said = set()
    for requests in (REQUESTS, TEXTS, *([request] for request in (*REQUESTS, *TEXTS))):
        expected = torch_answers(model, vlm, torch_inputs(converted.checkpoint, vlm, requests))
        assert vlm.answer(requests, ANSWER) == expected
        said |= set(expected)
    assert len(said) >= 4 and max(len(text.split()) for text in said) >= 5  # else little was compared


def test_an_image_counts(converted: Converted) -> None:
    """Else all of the above could hold of a model that looks at nothing."""
    vlm = VisionLanguageModel(open_package(converted.out))
    first, second = (
        vlm.decoder.last_logits(vlm.prefill([Request("help", image)]))
        for image in (picture(24, 24, 5), picture(24, 24, 6))
    )
    assert np.abs(first - second).max() > 0.01 * np.abs(first).max()


@pytest.mark.zoo
def test_deepstack_counts(conversions: Callable[[str, str], Converted]) -> None:
    """Each injected layer changes what the image's tokens give, and without an image there is nothing to inject."""
    vlm = VisionLanguageModel(open_package(conversions("qwen3_vl", "fp32").out))
    batch = vlm.batch([REQUESTS[0]])
    whole = vlm.decoder.prefill(batch)[0]["logits"]
    assert batch.images is not None and len(batch.images.injected) == len(DEEPSTACK)
    for name in batch.images.injected:
        rest = {other: rows for other, rows in batch.images.injected.items() if other != name}
        images = dataclasses.replace(batch.images, injected=rest)
        partial, _ = vlm.decoder.prefill(dataclasses.replace(batch, images=images))
        assert np.abs(partial["logits"] - whole).max() > 0.01 * np.abs(whole).max()
    feeds = vlm.decoder.prefill_feeds(vlm.batch(TEXTS))
    assert all(not feeds[f"deepstack_embeds_{number}"].any() for number in range(len(DEEPSTACK)))


# Guarded


def guarded(model: Path, tmp_path: Path) -> tuple[Directions, Path]:
    """A guard in mode `project` on every layer: it has no gate, so it changes every token."""
    directions = random_directions(TEXT_WIDTH, range(LAYERS), calibrated=False)
    path = write_directions(tmp_path / "directions.safetensors", directions)
    layers = tuple(range(LAYERS))
    result = export(
        model, tmp_path / "guarded", directions=path, spec=GuardSpec(mode="project", layers=layers, positions="all")
    )
    assert result.written and result.proof and all(check.ok for check in result.proof)
    return directions, result.out


def check_guard(checkpoint: Path, model: Any, directions: Directions, out: Path) -> None:
    """The guarded folder answers as transformers' own model does with the guard as forward hooks."""
    vlm = GuardedVLM.open(out)
    hooked = hooked_project(directions)
    for requests in (REQUESTS, TEXTS):
        given = torch_inputs(checkpoint, vlm, requests)
        unguarded = torch_answers(model, vlm, given)
        with hooked.attached(model.model.language_model.layers):
            expected = torch_answers(model, vlm, given)
        assert vlm.answer(requests, ANSWER) == expected != unguarded


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=_marks(kind)) for kind in KINDS])
def test_guarded_answers_are_those_of_torch_with_hooks(
    kind: str, conversions: Callable[[str, str], Converted], tmp_path: Path
) -> None:
    """DeepStack goes in behind the guarded output of a layer, as it does behind a hooked layer in torch."""
    converted = conversions(kind, "fp32")
    check_guard(converted.checkpoint, converted.torch_model(), *guarded(converted.out, tmp_path))


@pytest.mark.zoo
@pytest.mark.parametrize("kind", KINDS)
def test_from_checkpoint_to_guarded_folder(kind: str, tmp_path: Path) -> None:
    checkpoint = tiny_qwen.save_tiny_qwen(kind, tmp_path / "checkpoint")
    directions, out = guarded(checkpoint, tmp_path)
    family = find_family(read_config(checkpoint), str(checkpoint))
    check_guard(checkpoint, load_model(checkpoint, family, "fp32", lambda _: None), directions, out)
