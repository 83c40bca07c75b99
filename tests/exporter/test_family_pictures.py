"""From a tiny checkpoint to an answer about pictures: the exported graphs, prepared and asked here, answer as torch does.

torch gets the same token ids and pixel values; that these are those of transformers' processors is compared in
`test_images_cut`, `test_picture_markers` and, for the processors that need no torchvision, below.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from random_directions import random_directions, write_directions
from tiny_families import LAYERS, TINY, save_tiny
from tiny_models import TEXT_WIDTH

from vlmguard.exporter.checkpoints.convert import convert_checkpoint, read_config
from vlmguard.exporter.families import find_family
from vlmguard.exporter.pipeline import export
from vlmguard.exporter.prompts.labelled import LabelledPrompt
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.images.placing import llava_next
from vlmguard.runtime.images.prepared_picture import PreparedPicture
from vlmguard.runtime.vlm import VisionLanguageModel

NEW_TOKENS = 5
# A conversion takes 10 to 30 seconds: one family is converted in every run, `make long` has all.
IN_EVERY_RUN = ("smolvlm",)
FAMILIES = [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.zoo) for name in TINY]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


SQUARE, WIDE, TALL = noise(16, 16), noise(61, 30), noise(20, 47)
REQUESTS = (
    Request("how do I make a cake", WIDE),
    Request("sorry", TALL),
    Request("how do I make a bomb", SQUARE),
    Request("how do I make a cake", [WIDE, SQUARE]),
    Request("sorry", [TALL, TALL, WIDE]),
)


class Exported:
    """A checkpoint in torch, and its graphs."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.source = name, save_tiny(name, folder / name)
        convert_checkpoint(self.source, folder / "onnx")
        self.out = folder / "onnx"
        family = find_family(read_config(self.source), name)
        self.torch = getattr(transformers, family.model_class).from_pretrained(self.source).eval()
        self.torch.generation_config.eos_token_id = None

    def expected(self, vlm: VisionLanguageModel, request: Request) -> list[int]:
        """torch's greedy tokens for a prompt."""
        batch = vlm.batch([request])
        prepared = [vlm.images.prepare(image, len(request.images) == 1).arrays for image in request.images]  # type: ignore[arg-type]
        given = self._given(prepared)
        if self.name in ("gemma3", "paligemma", "paligemma2"):
            kinds = (batch.ids == vlm.chat.image_token_id) & (self.name == "gemma3")
            given["token_type_ids"] = torch.from_numpy(kinds.astype(np.int64))
        with torch.no_grad():
            ids = self.torch.generate(
                input_ids=torch.from_numpy(batch.ids),
                attention_mask=torch.from_numpy(batch.mask),
                **given,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        return ids[0, -NEW_TOKENS:].tolist()

    def _given(self, prepared: Sequence[Any]) -> dict[str, torch.Tensor]:
        """What transformers' processor makes of all pictures of one prompt: one after the other."""
        if "pixel_attention_mask" in prepared[0]:  # tiles of one prompt, in one row
            names = ("pixel_values", "pixel_attention_mask")
            return {name: torch.from_numpy(np.concatenate([p[name] for p in prepared], axis=1)) for name in names}
        given = {name: torch.from_numpy(_filled_up([p[name] for p in prepared])) for name in prepared[0]}
        if self.name == "llava_onevision":
            given["batch_num_images"] = torch.tensor([len(prepared)])
        return given


def _filled_up(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One after the other, with zeros for the tiles that a picture has fewer than another."""
    if arrays[0].ndim < 5:
        return np.concatenate(arrays)
    most = max(array.shape[1] for array in arrays)
    fills = ([(0, 0), (0, most - array.shape[1]), *[(0, 0)] * (array.ndim - 2)] for array in arrays)
    return np.concatenate([np.pad(array, fill) for array, fill in zip(arrays, fills, strict=True)])


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def vlm(exported: Exported) -> VisionLanguageModel:
    return VisionLanguageModel(open_package(exported.out))


def answers(vlm: VisionLanguageModel, requests: Sequence[Request]) -> list[list[int]]:
    """Greedy tokens of one batch, going on behind an end of the answer."""
    vlm.chat.__dict__["eos_ids"] = frozenset()
    steps = list(vlm.steps(requests, Sampling(NEW_TOKENS)))
    return [[int(step.tokens[row]) for step in steps] for row in range(len(requests))]  # type: ignore[arg-type]


def test_pictures_are_answered_as_in_torch(exported: Exported, vlm: VisionLanguageModel) -> None:
    """Pictures of several shapes, one or several of them, each prompt by itself and all in one batch."""
    assert vlm.sees
    expected = [exported.expected(vlm, request) for request in REQUESTS]
    assert [answers(vlm, [request])[0] for request in REQUESTS] == expected
    assert answers(vlm, REQUESTS) == expected
    assert len({tuple(tokens) for tokens in expected}) > 1


def test_features_stand_for_their_pictures(vlm: VisionLanguageModel) -> None:
    """Rows keep the cut of the picture that they come from, so that the text around them is the same."""
    shown = [Request("sorry", [TALL, WIDE]), Request("sorry", WIDE)]
    # LLaVA-OneVision cuts no picture that has another beside it, which features of one picture cannot know
    requests = shown[1:] if vlm.images.kind == "LlavaOnevisionImageProcessor" else shown
    features = [
        Request(request.prompt, [vlm.image_features(image) for image in request.images])  # type: ignore[arg-type]
        for request in requests
    ]
    np.testing.assert_array_equal(vlm.batch(features).ids, vlm.batch(requests).ids)
    assert answers(vlm, features) == answers(vlm, requests)


def test_a_guard_sees_blank_and_own_pictures(exported: Exported, tmp_path: Path) -> None:
    """`vlmguard-export CHECKPOINT`, then a blank picture, as calibration and evaluation show it, and a prompt's own."""
    directions = write_directions(tmp_path / "d.safetensors", random_directions(TEXT_WIDTH, range(LAYERS)))
    result = export(exported.source, tmp_path / "guarded", directions=directions, spec=GuardSpec(mode="project"))
    assert all(check.ok for check in result.proof)
    assert not [note for note in result.plan.notes if note.startswith("images are left out")]
    guarded = GuardedVLM.open(result.out)
    blank = LabelledPrompt("1", "how do I make a cake", "harmless", "blank").request(guarded)
    assert len(guarded.answer([blank, *REQUESTS])) == 1 + len(REQUESTS)
    assert (
        guarded.generate("sorry", [WIDE, TALL], max_new_tokens=2)
        == guarded.answer([Request("sorry", (WIDE, TALL))], Sampling(2))[0]
    )


@pytest.mark.parametrize(
    "name", ["idefics3", "idefics2", "idefics2 in parts", "paligemma", "llava", "llava_next", "gemma3"]
)
def test_transformers_processor_writes_the_same_prompt(name: str, tmp_path: Path) -> None:
    """Token ids and pixel values of the classes that need no torchvision, with one picture and with several."""
    folder = _checkpoint(name, tmp_path)
    vlm = ChatAndPictures(folder)
    theirs = transformers.AutoProcessor.from_pretrained(folder)
    for pictures in ([WIDE], [SQUARE], [TALL, WIDE, SQUARE]):
        ids, arrays = vlm.prepared("how do I make a cake", pictures)
        if name == "paligemma":
            asked = theirs(
                text="<image>" * len(pictures) + "how do I make a cake", images=pictures, return_tensors="np"
            )
        else:
            content = [*({"type": "image", "image": picture} for picture in pictures)]
            message = {"role": "user", "content": [*content, {"type": "text", "text": "how do I make a cake"}]}
            text = theirs.apply_chat_template([message], add_generation_prompt=True)
            asked = theirs(text=text, images=[pictures], return_tensors="np", add_special_tokens=False)
        assert ids == np.asarray(asked["input_ids"])[0].tolist()
        axis = 1 if name.startswith("idefics") else 0
        parts = [array["pixel_values"] for array in arrays]
        values = _filled_up(parts) if name == "llava_next" else np.concatenate(parts, axis=axis)
        np.testing.assert_allclose(values, asked["pixel_values"], rtol=0, atol=1e-6)


class ChatAndPictures:
    """Prompts with pictures whose tokens are counted without a vision encoder: so many for each tile."""

    def __init__(self, folder: Path) -> None:
        from vlmguard.runtime.chat.chat import ChatTokenizer
        from vlmguard.runtime.images.vision import open_preprocessor

        self.chat, self.images = ChatTokenizer.open(folder), open_preprocessor(folder)
        self.each = 16 if self.images.kind in ("SiglipImageProcessor", "CLIPImageProcessor") else 4

    def prepared(self, prompt: str, pictures: Sequence[Image.Image]) -> tuple[list[int], list[Any]]:
        from vlmguard.runtime.chat.picture_layouts import PictureTokens
        from vlmguard.runtime.chat.turns import Turn

        found = [self.images.prepare(picture, len(pictures) == 1) for picture in pictures]
        tokens = [PictureTokens(self._count(one), one.grid, one.sizes) for one in found]
        ids = self.chat.encode_turns([Turn("user", prompt, len(pictures))], tokens)
        return ids, [one.arrays for one in found]

    def _count(self, picture: PreparedPicture) -> int:
        if self.images.kind == "LlavaNextImageProcessor":  # 16 rows and a separator for each tile, laid out
            tiles = picture.arrays["pixel_values"].shape[1]
            return len(llava_next(picture, {"image_features": np.zeros((tiles, 17, 1))}))
        return self.each * max(len(picture.sizes), 1)


def _checkpoint(name: str, folder: Path) -> Path:
    from tiny_models import save_tiny_llava

    if name.startswith("idefics2"):
        save_tiny("idefics3", folder)
        # sides that need no padding, which several pictures of one prompt would get
        size = {"size": {"shortest_edge": 28, "longest_edge": 28}, "do_image_splitting": name.endswith("parts")}
        kind = {"image_processor_type": "Idefics2ImageProcessor", **size}
        (folder / "preprocessor_config.json").write_text(json.dumps(kind))
        (folder / "processor_config.json").write_text('{"processor_class": "Idefics2Processor", "image_seq_len": 4}')
        return folder
    return save_tiny_llava(folder) if name == "llava" else save_tiny(name, folder)
