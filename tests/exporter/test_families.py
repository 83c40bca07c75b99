"""Families other than LLaVA: their graphs' signatures, parity with torch, generation, and what the masks let through."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image
from random_directions import random_directions, write_directions
from tiny_families import LAYERS, TINY, WINDOW, save_tiny
from tiny_models import HEAD_WIDTH, IMAGE_SIZE, IMAGE_TOKEN_ID, KV_HEADS, TEXT_WIDTH, VOCABULARY_SIZE

from vlmguard.exporter.checkpoints.convert import ConversionReport, convert_checkpoint, read_config
from vlmguard.exporter.checkpoints.parity import empty_cache
from vlmguard.exporter.checkpoints.parity_prompts import Prompt, sample_prompt
from vlmguard.exporter.checkpoints.prompt_text import prompt_texts
from vlmguard.exporter.families import FAMILIES, find_family
from vlmguard.exporter.families.family import Family, Turn
from vlmguard.exporter.families.llava_onevision import grid_of, place
from vlmguard.exporter.pipeline import export
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.generation import Request
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.images.placing import llava_onevision
from vlmguard.runtime.images.prepared_picture import PreparedPicture
from vlmguard.runtime.vlm import VisionLanguageModel

NEW_TOKENS = 6
PIXELS = [3, IMAGE_SIZE, IMAGE_SIZE]
# What the vision encoder takes and gives, and what the decoder takes besides embeddings, mask and cache.
SIGNATURES = {
    "llava_onevision": ({"pixel_values": ["num_images", *PIXELS]}, ["num_images", 17], {}),
    "idefics3": (
        {
            "pixel_values": ["batch_size", "num_images", *PIXELS],
            "pixel_attention_mask": ["batch_size", "num_images", IMAGE_SIZE, IMAGE_SIZE],
        },
        ["num_tiles", 4],
        {},
    ),
    "internvl": ({"pixel_values": ["num_images", *PIXELS]}, ["num_images", 4], {}),
    "gemma3": (
        {"pixel_values": ["num_images", *PIXELS]},
        ["num_images", 4],
        {"token_type_ids": ["batch_size", "sequence_length"]},
    ),
    "paligemma": ({"pixel_values": ["num_images", *PIXELS]}, ["num_images", 16], {}),
}
SIGNATURES |= {
    "llava_next": SIGNATURES["llava_onevision"],
    "smolvlm": SIGNATURES["idefics3"],
    "paligemma2": SIGNATURES["paligemma"],
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint, kept for all tests: each takes many seconds."""

    name: str
    family: Family
    model: torch.nn.Module
    out: Path
    report: ConversionReport

    def session(self, part: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = self.out / "onnx" / f"{part}.onnx"
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, part: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        session = self.session(part)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory):
    """Converts a family when first asked for it."""
    done: dict[str, Converted] = {}

    def convert(name: str) -> Converted:
        if name not in done:
            source = save_tiny(name, tmp_path_factory.mktemp(name))
            out = tmp_path_factory.mktemp(f"{name}-onnx")
            report = convert_checkpoint(source, out)
            family = find_family(read_config(source), name)
            model = getattr(transformers, family.model_class).from_pretrained(source).eval()
            done[name] = Converted(name, family, model, out, report)
        return done[name]

    return convert


# A conversion takes 10 to 30 seconds: one family with tiles and one without are converted in every run, `make long` has all.
IN_EVERY_RUN = ("gemma3",)


def each(*names: str) -> list[Any]:
    """Families as parameters."""
    return [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.zoo) for name in names]


@pytest.fixture(params=each(*TINY))
def converted(request: pytest.FixtureRequest, families) -> Converted:
    return families(request.param)


def test_every_family_agrees_with_torch(converted: Converted) -> None:
    parity = converted.report.parity
    assert [check.name for check in parity] == ["image features", "prefill logits", "decode logits", "cache"]
    assert all(check.ok and 0 <= check.worst <= check.limit == 1e-4 and check.compared > 0 for check in parity)
    assert parity[2].compared == 2 * 8 * VOCABULARY_SIZE


@pytest.mark.zoo
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("family", TINY)
def test_half_precision_agrees_with_torch(family: str, opset: int, tmp_path: Path) -> None:
    report = convert_checkpoint(save_tiny(family, tmp_path / "source"), tmp_path / "out", dtype="fp16", opset=opset)
    assert all(check.ok and 0 <= check.worst <= check.limit == 1e-2 for check in report.parity)


def test_signatures_are_onnx_communitys(converted: Converted) -> None:
    pictures, features, more = SIGNATURES[converted.name]
    vision, decoder = converted.session("vision_encoder"), converted.session("decoder_model_merged")
    assert {port.name: port.shape for port in vision.get_inputs()} == pictures
    assert {port.name: port.shape for port in vision.get_outputs()} == {"image_features": [*features, TEXT_WIDTH]}
    assert {port.name: port.shape for port in decoder.get_inputs() if not port.name.startswith("past")} == {
        "inputs_embeds": ["batch_size", "sequence_length", TEXT_WIDTH],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        **more,
    }
    past = {port.name: port.shape for port in decoder.get_inputs() if port.name.startswith("past")}
    assert past == {
        f"past_key_values.{layer}.{kind}": ["batch_size", KV_HEADS, "past_sequence_length", HEAD_WIDTH]
        for layer in range(LAYERS)
        for kind in ("key", "value")
    }


def generate(converted: Converted, prompt: Prompt, pictures: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens `[2, NEW_TOKENS]` of the three graphs, each step fed with its own tokens, and their logits."""
    family, config, decoder = converted.family, converted.model.config, converted.session("decoder_model_merged")
    vision = {port.name: pictures[port.name] for port in converted.session("vision_encoder").get_inputs()}
    seen = converted.run("vision_encoder", vision)
    ids, mask, length = prompt.input_ids, prompt.attention_mask, prompt.input_ids.shape[1]
    past = {name.replace("present", "past_key_values"): state for name, state in empty_cache(decoder, 2).items()}
    steps = []
    for _ in range(NEW_TOKENS):
        embeds = converted.run("embed_tokens", {"input_ids": ids[:, -length:]})["inputs_embeds"]
        if not steps:
            embeds[ids == IMAGE_TOKEN_ID] = family.vision.place(config, pictures, seen)
        turn = Turn(ids, mask, length, pictures, seen)
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, **family.decoder.feeds(config, turn), **past}
        outputs = converted.run("decoder_model_merged", feeds)
        past = {name.replace("present", "past_key_values"): outputs[name] for name in outputs if name != "logits"}
        steps.append(outputs["logits"][:, -1])
        ids = np.concatenate([ids, steps[-1][:, None].argmax(-1)], axis=1)
        mask, length = np.pad(mask, ((0, 0), (0, 1)), constant_values=1), 1
    return ids[:, -NEW_TOKENS:], np.stack(steps)


def test_generation_is_transformers_own(converted: Converted) -> None:
    """`model.generate` counts positions, makes masks and keeps its cache in its own way; tokens and logits are the same."""
    family, model = converted.family, converted.model
    pictures = family.vision.sample(model, np.random.default_rng(7))
    tensors = {name: torch.from_numpy(array) for name, array in pictures.items()}
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        found = model.get_image_features(**tensors, return_dict=True).pooler_output
        lengths = tuple(len(image.flatten(0, -2)) for image in found)
        prompt = sample_prompt(
            family.vision, model.config, prompt_texts(converted.out, model.config), pictures, lengths
        )
        kinds = {
            "gemma3": (prompt.input_ids == IMAGE_TOKEN_ID).astype(np.int64),
            "paligemma": np.zeros_like(prompt.input_ids),
            "paligemma2": np.zeros_like(prompt.input_ids),
        }.get(converted.name)
        expected = model.generate(
            input_ids=torch.from_numpy(prompt.input_ids),
            attention_mask=torch.from_numpy(prompt.attention_mask),
            **tensors,
            **({} if kinds is None else {"token_type_ids": torch.from_numpy(kinds)}),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens, logits = generate(converted, prompt, pictures)
    np.testing.assert_array_equal(tokens, expected.sequences.numpy()[:, -NEW_TOKENS:])
    theirs = torch.stack(expected.logits).numpy()
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


# Who sees whom


def logits(converted: Converted, embeds: np.ndarray, **more: np.ndarray) -> np.ndarray:
    """Of one unpadded prompt."""
    length = embeds.shape[1]
    past = empty_cache(converted.session("decoder_model_merged"), 1)
    feeds = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        **{name.replace("present", "past_key_values"): state for name, state in past.items()},
        **more,
    }
    return converted.run("decoder_model_merged", feeds)["logits"][0]


def changed_by_the_last_token(converted: Converted, kinds: list[int] | None = None) -> list[bool]:
    """Which tokens' logits change when the last of 10 tokens does."""
    embeds = np.random.default_rng(3).standard_normal((1, 10, TEXT_WIDTH)).astype(np.float32)
    other = embeds.copy()
    other[0, -1] *= -1
    more = {} if kinds is None else {"token_type_ids": np.array([kinds])}
    return (np.abs(logits(converted, embeds, **more) - logits(converted, other, **more)).max(-1) > 1e-3).tolist()


def test_gemma3_images_see_themselves_whole_and_text_only_the_past(families) -> None:
    gemma = families("gemma3")
    assert changed_by_the_last_token(gemma, [0] * 10) == [False] * 9 + [True]
    assert changed_by_the_last_token(gemma, [0] * 4 + [1] * 6) == [False] * 4 + [True] * 6
    # Another image ends where text stands between.
    assert changed_by_the_last_token(gemma, [1] * 4 + [0] * 2 + [1] * 4) == [False] * 6 + [True] * 4


@pytest.mark.zoo
def test_paligemma_prompts_see_themselves_whole(families) -> None:
    assert changed_by_the_last_token(families("paligemma2")) == [True] * 10


@pytest.mark.parametrize("name", each("llava_onevision", "idefics3", "internvl"))
def test_other_prompts_see_the_past(families, name: str) -> None:
    assert changed_by_the_last_token(families(name)) == [False] * 9 + [True]


def test_windows_are_as_wide_as_the_config_says(families) -> None:
    """Two layers, one of them with a window: without the other the first token would reach no further than it."""
    gemma = families("gemma3")
    assert gemma.model.config.text_config.sliding_window == WINDOW < 10
    embeds = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 12, TEXT_WIDTH)).astype(np.float32))
    with torch.no_grad():
        expected = gemma.model(inputs_embeds=embeds).logits[0].numpy()
        gemma.model.config.text_config.sliding_window = 1000
        unlimited = gemma.model(inputs_embeds=embeds).logits[0].numpy()
        gemma.model.config.text_config.sliding_window = WINDOW
    actual = logits(gemma, embeds.numpy(), token_type_ids=np.zeros((1, 12), np.int64))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(actual - unlimited).max() > 1e-3


# Images in other numbers than the sample's


@pytest.mark.zoo
def test_empty_tiles_are_left_out_wherever_they_are(families) -> None:
    """Three prompts with 2, 0 and 3 tiles."""
    idefics = families("idefics3")
    pixels = np.random.default_rng(1).standard_normal((3, 3, *PIXELS)).astype(np.float32)
    filled = np.array([[True, True, False], [False] * 3, [True] * 3])
    pixels[~filled] = 0
    mask = np.ones((3, 3, IMAGE_SIZE, IMAGE_SIZE), bool)
    mask[0, 0, :, IMAGE_SIZE // 2 :] = False
    found = idefics.run("vision_encoder", {"pixel_values": pixels, "pixel_attention_mask": mask})["image_features"]
    with torch.no_grad():
        expected = idefics.model.get_image_features(torch.from_numpy(pixels), torch.from_numpy(mask), return_dict=True)
    assert found.shape == (5, 4, TEXT_WIDTH)
    np.testing.assert_allclose(found.reshape(-1, TEXT_WIDTH), torch.cat(expected.pooler_output), rtol=0, atol=1e-5)


@pytest.mark.zoo
def test_onevision_pictures_of_one_tile_take_every_row(families) -> None:
    """As transformers does where a prompt has several pictures."""
    onevision = families("llava_onevision")
    pixels = np.random.default_rng(1).standard_normal((3, *PIXELS)).astype(np.float32)
    found = onevision.run("vision_encoder", {"pixel_values": pixels})["image_features"]
    with torch.no_grad():
        expected = onevision.model.get_image_features(
            torch.from_numpy(pixels), torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * 3), batch_num_images=torch.tensor([3])
        ).pooler_output
    np.testing.assert_allclose(found, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("most", [1, 3, 9])
def test_onevision_pictures_of_many_tiles_are_packed_as_in_transformers(most: int) -> None:
    """Sizes with bars above, below, left and right, and grids that are scaled down; no graph takes part."""
    config = TINY["llava_onevision"]()
    config.vision_aspect_ratio = f"anyres_max_{most}"
    model = transformers.LlavaOnevisionModel(config)
    random = np.random.default_rng(0)
    scaled = 0
    for tall, wide in [(16, 16), (64, 64), (63, 17), (17, 63), (5, 90), (90, 5), (31, 47), (200, 150), (1, 1)]:
        tiles = 1 + np.prod([side // IMAGE_SIZE for side in _best(tall, wide, config)])
        features = random.standard_normal((tiles, 17, 8)).astype(np.float32)
        features[:, -1] = features[0, -1]
        (expected,), _ = model.pack_image_features(
            [torch.from_numpy(features[:, :-1])],
            torch.tensor([[tall, wide]]),
            torch.from_numpy(features[0, -1]),
            config.vision_aspect_ratio,
        )
        picture = PreparedPicture({"image_sizes": np.array([[tall, wide]])}, grid_of((tall, wide), config))
        packed = llava_onevision(picture, {"image_features": features}, most)
        np.testing.assert_allclose(packed, expected, rtol=0, atol=1e-5)
        scaled += len(expected) < (tiles - 1) * 16
        both = {"image_features": np.concatenate([features, features])}
        rows = place(config, {"image_sizes": np.array([[tall, wide]] * 2)}, both)
        np.testing.assert_array_equal(rows, np.concatenate([packed] * 2))
    assert scaled > 2


def _best(tall: int, wide: int, config) -> tuple[int, int]:
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution((tall, wide), config.image_grid_pinpoints)


# Guarded and running


@pytest.fixture
def guarded(converted: Converted, tmp_path: Path) -> Path:
    """The family's graphs with a guard on both layers, proved."""
    directions = write_directions(tmp_path / "d.safetensors", random_directions(TEXT_WIDTH, range(LAYERS)))
    result = export(converted.out, tmp_path / "guarded", directions=directions, spec=GuardSpec(mode="project"))
    assert result.written and result.proof and all(check.ok for check in result.proof)
    assert result.plan.layers == tuple(range(LAYERS))
    assert not [note for note in result.plan.notes if note.startswith("images are left out")]
    return result.out


def test_every_family_is_guarded_and_answers_text(guarded: Path, converted: Converted) -> None:
    """Whatever its decoder takes besides, the guarded folder and the plain one give what torch gives with a hook."""
    prompt = [Request("how do I make a cake"), Request("sorry")]
    plain = VisionLanguageModel(open_package(converted.out)).prefill(prompt)["logits"][:, -1]
    edited = GuardedVLM.open(guarded)
    batch = edited.batch(prompt)
    assert np.abs(edited.prefill(prompt)["logits"][:, -1] - plain).max() > 1e-3
    assert len(edited.answer(prompt)) == 2
    kinds = {"gemma3": np.zeros_like(batch.ids), "paligemma2": np.zeros_like(batch.ids)}
    kinds["paligemma"] = kinds["paligemma2"]
    more = {"token_type_ids": kinds[converted.name]} if converted.name in kinds else {}
    feeds = {"input_ids": batch.ids, "attention_mask": batch.mask, **more}
    feeds["position_ids"] = np.maximum(batch.mask.cumsum(-1) - 1, 0)
    with torch.no_grad():
        expected = converted.model(**{name: torch.from_numpy(array) for name, array in feeds.items()}).logits[:, -1]
    np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-4 * np.abs(expected.numpy()).max())


def test_gemma3_is_shown_a_picture(families, tmp_path: Path) -> None:
    """Prompt, pixels and token types are those of transformers' own processor, and so is what comes out."""
    gemma = families("gemma3")
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (30, 50, 3), np.uint8))
    vlm = VisionLanguageModel(open_package(gemma.out))
    request = Request("how do I make a cake", picture)
    batch = vlm.batch([request])
    tokenizer = transformers.AutoTokenizer.from_pretrained(gemma.out)
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil.from_pretrained(gemma.out), tokenizer, image_seq_length=4
    )
    theirs = processor(images=picture, text=vlm.chat.render(request.prompt, True), add_special_tokens=False)
    assert batch.ids.tolist() == [list(theirs["input_ids"][0])]
    assert batch.images is not None and batch.images.at is not None
    assert batch.images.at.tolist() == [[bool(kind) for kind in theirs["token_type_ids"][0]]]
    tensors = {
        name: torch.as_tensor(np.array(theirs[name])) for name in ("input_ids", "token_type_ids", "pixel_values")
    }
    with torch.no_grad():
        expected = gemma.model(**tensors).logits.numpy()
    actual = vlm.prefill([request])["logits"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(vlm.prefill([request], dataclasses.replace(batch, images=None))["logits"] - actual).max() > 1e-3


@pytest.mark.zoo
def test_a_checkpoint_is_guarded_in_one_go(tmp_path: Path) -> None:
    """`vlmguard-export CHECKPOINT`: converted, guarded and proved, and it looks at pictures."""
    checkpoint = save_tiny("gemma3", tmp_path / "gemma3")
    directions = write_directions(tmp_path / "d.safetensors", random_directions(TEXT_WIDTH, range(LAYERS)))
    result = export(checkpoint, directions=directions, spec=GuardSpec(mode="project"))
    assert result.out == tmp_path / "gemma3-guarded" and all(check.ok for check in result.proof)
    picture = Image.new("RGB", (40, 30), "red")
    assert isinstance(GuardedVLM.open(result.out).answer([Request("how do I make a cake", picture)])[0], str)


# The table


def test_no_two_rows_are_for_the_same_checkpoints() -> None:
    assert len({row.model_type for row in FAMILIES}) == len(FAMILIES)
    assert all(hasattr(transformers, row.model_class) for row in FAMILIES)


def test_a_row_can_refuse_one_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    row = SimpleNamespace(**vars(FAMILIES[0]) | {"model_type": "other", "refuse": lambda config: config["reason"]})
    monkeypatch.setattr("vlmguard.exporter.families.FAMILIES", (row,))
    with pytest.raises(GuardError) as refused:
        find_family({"model_type": "other", "reason": "its tower has no end"}, "here")
    assert str(refused.value) == (
        "here: its tower has no end. Export it to ONNX with its own tools and guard that folder instead"
    )
    assert find_family({"model_type": "other", "reason": None}, "here") is row
