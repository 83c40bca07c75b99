"""Models of which the generic row must know one more thing: who generates, which class saved them, which table has a token."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from families.small_checkpoint import save_small
from PIL import Image
from transformers.cache_utils import DynamicCache
from transformers.models.blip_2.modeling_blip_2 import Blip2ForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerForConditionalGeneration
from transformers.models.shieldgemma2.modeling_shieldgemma2 import ShieldGemma2ForImageClassification

from vlmguard.exporter.checkpoints import fit
from vlmguard.exporter.checkpoints.convert import load_model
from vlmguard.exporter.checkpoints.tidy import index_with_int64
from vlmguard.exporter.families import find_family, sample_pictures
from vlmguard.exporter.families.encoder_texts import with_texts
from vlmguard.exporter.families.family import Vision
from vlmguard.exporter.families.generic import GenericDecoder
from vlmguard.exporter.families.generic_vision import traced_shapes
from vlmguard.exporter.families.position_rules import counted
from vlmguard.exporter.families.random_pixels import random_pixels, required_inputs
from vlmguard.exporter.families.recorded import record, rope_index_inputs
from vlmguard.exporter.families.sample_pictures import joined
from vlmguard.exporter.families.transformers_class import saved_class, transformers_class
from vlmguard.graphs.errors import ModelUnreadable


def test_a_generation_of_a_part_is_recorded_with_the_logits_of_the_whole_prompt(tmp_path: Path) -> None:
    save_small("blip-2", tmp_path)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = np.array([[1, 400, 400, 400, 400, 20, 21]] * 2)
    mask = np.ones_like(ids)
    mask[0, 0] = 0
    pixels = np.random.default_rng(0).standard_normal((2, 3, 56, 56)).astype(np.float32)
    recording = record(model, ids, mask, {"pixel_values": pixels}, steps=2)
    assert [logits.shape for logits in recording.logits] == [(2, 7, 512), (2, 1, 512), (2, 1, 512)]
    assert [token.shape for token in recording.tokens] == [(2, 1)] * 2
    with torch.no_grad():
        whole = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            pixel_values=torch.from_numpy(pixels),
        )
    np.testing.assert_allclose(recording.logits[0][1], whole.logits[1].numpy(), atol=1e-4)
    np.testing.assert_array_equal(recording.tokens[0][1, 0], whole.logits[1, -1].argmax().numpy())


def test_a_language_model_with_a_head_of_its_own_is_run_as_the_decoder(tmp_path: Path) -> None:
    save_small("blip-2", tmp_path)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 20, 21, 22]])
    with torch.no_grad():
        decoder = GenericDecoder(counted, inner=True)
        output = decoder.run(
            model, **decoder.embeds(model, ids), attention_mask=torch.ones_like(ids), position_ids=None
        )
        expected = model.language_model(input_ids=ids).logits
    torch.testing.assert_close(output.logits, expected)
    assert output.past_key_values.get_seq_length() == 4


def test_weights_are_read_by_the_class_that_saved_them() -> None:
    config = {"model_type": "shieldgemma2", "architectures": ["ShieldGemma2ForImageClassification"]}
    assert saved_class(config, Gemma3ForConditionalGeneration) is ShieldGemma2ForImageClassification
    for other in (
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"model_type": "gemma3", "architectures": ["ShieldGemma2ForImageClassification"]},
        {"model_type": "shieldgemma2"},
        {"model_type": "shieldgemma2", "architectures": ["SomethingElse"]},
        {"model_type": "shieldgemma2", "architectures": [None]},
        {"model_type": "shieldgemma2", "architectures": ["Gemma3ForConditionalGeneration"]},
    ):
        assert saved_class(other, Gemma3ForConditionalGeneration) is Gemma3ForConditionalGeneration


def test_a_model_within_a_classifier_is_the_one_that_is_exported(tmp_path: Path) -> None:
    save_small("shieldgemma2", tmp_path)
    config = {"model_type": "shieldgemma2"}
    model = load_model(tmp_path, find_family(config, "here"), "fp32", lambda stage, done, total: None)
    assert type(model) is Gemma3ForConditionalGeneration
    whole = ShieldGemma2ForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(model.get_input_embeddings().weight, whole.get_input_embeddings().weight)


class Table(torch.nn.Module):
    """Embeddings of the tokens from `vocab_offset` on, as Gemma 3n has them for its marks of pictures and sounds."""

    def __init__(self, offset: int, size: int) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding(size, 2)
        self.vocab_offset, self.vocab_size = offset, size

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.rows(input_ids - self.vocab_offset)


def test_a_token_is_embedded_by_the_table_that_has_it() -> None:
    class Model(torch.nn.Module):
        # without a padding token, as Molmo 2
        config = SimpleNamespace(image_token_id=11, get_text_config=lambda: SimpleNamespace())

        def __init__(self) -> None:
            super().__init__()
            self.sounds, self.pictures, self.words = Table(12, 3), Table(10, 2), torch.nn.Embedding(15, 2)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.words

    model = Model()
    with torch.no_grad():
        rows = GenericDecoder(None).embeds(model, torch.tensor([[3, 9, 10, 12, 14]]))["inputs_embeds"][0]
    tables = (model.words, model.pictures.rows, model.sounds.rows)
    words, pictures, sounds = (table.weight.detach() for table in tables)
    assert torch.equal(rows, torch.stack([words[3], words[9], pictures[0], sounds[0], sounds[2]]))


def test_marks_stand_around_a_picture_where_positions_depend_on_them() -> None:
    omni = Qwen2_5OmniThinkerForConditionalGeneration
    config = SimpleNamespace(vision_start_token_id=5, vision_end_token_id=6)
    model: Any = SimpleNamespace(config=config, get_rope_index=omni.get_rope_index)
    assert "mm_token_type_ids" not in rope_index_inputs(model)
    assert fit._around(model) == ([5], [6])

    def get_rope_index(input_ids: Any, mm_token_type_ids: Any) -> None: ...

    model.get_rope_index = get_rope_index
    assert fit._around(model) == ([], [])
    assert fit._around(SimpleNamespace(config=config)) == ([], [])  # type: ignore[arg-type]


@pytest.mark.parametrize("depends", ["values", "rows", ""])
def test_prompts_have_pictures_of_one_size_where_features_depend_on_the_batch(depends: str) -> None:
    class Encoder:
        dtype = torch.float32
        config = SimpleNamespace()

        def get_image_features(self, pixel_values: torch.Tensor, return_dict: bool = True) -> torch.Tensor:
            rows = pixel_values.sum(dim=2) if depends == "rows" else pixel_values.sum(dim=(1, 2))[:, None]
            return (rows / pixel_values[0].numel() if depends == "values" else rows)[..., None]

    wide, tall = ({"pixel_values": np.ones((1, *size), np.float32)} for size in ((2, 6), (5, 3)))
    pictures = fit._pair(Encoder(), [wide, tall, wide])
    assert len(pictures) == (4 if depends else 3)
    assert pictures[0] is wide and pictures[1] is (wide if depends else tall)


def test_features_that_are_added_to_a_token_come_with_its_embedding() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = torch.nn.Embedding(4, 2)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.words

    model, rows = Model(), torch.ones(3, 2)
    vision = Vision(
        lambda model: {}, lambda model: {}, lambda model: {"image_features": rows, "deep": rows}, lambda *_: {}
    )
    changed, (seen,) = fit._on_token(model, 2, vision, [{"image_features": rows.numpy(), "deep": rows.numpy()}])
    outputs, expected = changed.run(model), 1 + model.words.weight[2].detach().expand(3, 2)
    assert torch.equal(outputs["image_features"], expected) and torch.equal(outputs["deep"], rows)
    np.testing.assert_array_equal(seen["image_features"], expected.numpy())
    assert changed.reference is not None
    with pytest.raises(IndexError):
        fit._on_token(model, 4, vision, [])


@pytest.mark.parametrize("marks", ["mm_token_type_ids", ""])
def test_marks_are_read_with_a_cache_too(marks: str) -> None:
    class Model(torch.nn.Module):
        def get_decoder(self) -> Any:
            return self

        def forward(self, past_key_values: Any, use_cache: bool, mm_token_type_ids: Any = None) -> Any:
            prompt = not past_key_values.is_initialized
            return SimpleNamespace(logits=mm_token_type_ids if prompt else None, past_key_values=past_key_values)

    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), 0)
    inputs = {"token_type_ids": torch.ones(1, 1)} if marks else {}
    output = GenericDecoder(None, marks).run(Model(), past_key_values=cache, **inputs)
    assert (output.logits is not None) == bool(marks) and cache.is_initialized


def test_a_decoder_that_embeds_pixels_gets_rows_of_them() -> None:
    class Fuyu:
        config = SimpleNamespace(patch_size=4, num_channels=3)

        def get_image_features(self, pixel_values: Any) -> None: ...

    pictures = random_pixels(Fuyu(), lambda arrays: None)
    assert pictures is not None
    assert [picture["pixel_values"].shape for picture in pictures] == [(1, rows, 48) for rows in (24, 24, 40, 8)]


def test_an_encoder_that_reads_the_prompt_gets_a_text() -> None:
    class Encoder:
        config = SimpleNamespace(qformer_config=SimpleNamespace(vocab_size=30))

        def get_image_features(
            self, pixel_values: Any, qformer_input_ids: Any, qformer_attention_mask: Any = None
        ) -> None: ...

    model = Encoder()
    assert required_inputs(model) == {"pixel_values", "qformer_input_ids"}
    first, second = with_texts(model, [{"pixel_values": np.zeros(1)}] * 2)
    assert first["qformer_input_ids"].shape == first["qformer_attention_mask"].shape == (1, 5)
    assert second["qformer_input_ids"].shape == (1, 8) and int(second["qformer_input_ids"].max()) < 30
    assert first["qformer_attention_mask"].all()


@pytest.mark.parametrize("leading", [(), (1,)], ids=["tiles, 3, height, width", "1, tiles, 3, height, width"])
def test_pictures_that_are_all_cut_alike_are_joined_by_one_with_other_tiles(
    leading: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cohere 2 Vision's: a graph that is traced on thirteen tiles each would take no other number of them."""

    def prepare(image: Image.Image) -> Any:
        tiles = 13 if image.height >= 200 else 1
        return SimpleNamespace(arrays={"pixel_values": np.zeros((*leading, tiles, 3, 8, 8), np.float32)})

    processor = SimpleNamespace(prepare=prepare)
    monkeypatch.setattr(sample_pictures, "open_preprocessor", lambda folder: processor)
    shapes = traced_shapes(sample_pictures.sample_pictures(tmp_path))
    assert shapes == {"pixel_values": (*leading, "num_images", 3, 8, 8)}


def test_patches_of_pictures_in_a_batch_are_counted_on() -> None:
    pooling = np.array([[0, 1], [2, -1]])
    first = {"pixel_values": np.zeros((3, 4, 6), np.float32), "image_token_pooling": pooling}
    second = {"pixel_values": np.zeros((1, 4, 6), np.float32), "image_token_pooling": pooling}
    both = joined([first, second])
    assert both["pixel_values"].shape == (4, 4, 6)
    assert both["image_token_pooling"].tolist() == [[0, 1], [2, -1], [12, 13], [14, -1]]


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed; make families installs it")
def test_pictures_are_put_together_as_molmo_does() -> None:
    options = {"size": {"height": 56, "width": 56}, "overlap_margins": [1, 1], "max_crops": 4}
    processor = transformers_class("Molmo2ImageProcessor")(**options)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)) for size in ((60, 90), (120, 50))]
    singles = [{n: t.numpy() for n, t in processor(images=[image], return_tensors="pt").items()} for image in images]
    together, both = joined(singles), processor(images=images, return_tensors="pt")
    assert together.keys() == both.keys()
    for name, array in together.items():
        np.testing.assert_array_equal(array, both[name].numpy())


def test_an_image_processor_that_lacks_an_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder:
        config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=4))

        def get_image_features(self, pixel_values: Any, odd: Any) -> None: ...

    monkeypatch.setattr(fit, "sample_pictures", lambda folder: [{"images": np.zeros(1)}])
    with pytest.raises(ModelUnreadable) as refused:
        fit._pictures(Encoder(), tmp_path, lambda stage, done, total: None)
    assert str(refused.value) == (
        f"{tmp_path}: its image processor does not return odd, pixel_values, which its vision encoder takes; "
        "prepare its inputs elsewhere, or use text-only prompts"
    )


@pytest.mark.parametrize("kind", ["GatherND", "ScatterND"])
def test_indices_of_an_exported_graph_are_int64(kind: str) -> None:
    def graph_of(dtype: ir.DataType) -> ir.Graph:
        data = ir.Value(name="data", shape=ir.Shape([4, 2]), type=ir.TensorType(ir.DataType.FLOAT))
        indices = ir.Value(name="indices", shape=ir.Shape([3, 1]), type=ir.TensorType(dtype))
        node = ir.node(kind, [data, indices, *([data] if kind == "ScatterND" else [])])
        return ir.Graph([data, indices], node.outputs, nodes=[node], opset_imports={"": 18})

    graph = graph_of(ir.DataType.INT32)
    index_with_int64(graph)
    cast, node = graph
    assert (cast.op_type, cast.inputs[0].name, node.inputs[1]) == ("Cast", "indices", cast.outputs[0])  # type: ignore[union-attr]
    assert cast.attributes["to"].as_int() == ir.DataType.INT64
    untouched = graph_of(ir.DataType.INT64)
    index_with_int64(untouched)
    assert [node.op_type for node in untouched] == [kind]
