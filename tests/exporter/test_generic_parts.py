"""What the generic row computes in place of transformers' Python loops, against transformers' own functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families.small_checkpoint import small_model
from transformers import vision_utils
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from vlmguard.exporter.checkpoints.foreign_failures import WHAT_TO_DO, in_one_line
from vlmguard.exporter.checkpoints.parity import _compare
from vlmguard.exporter.checkpoints.parts import _vocabulary
from vlmguard.exporter.checkpoints.traced_state import names_of, present_of
from vlmguard.exporter.families.anyres_packing import best_resolution, pack
from vlmguard.exporter.families.family import Turn
from vlmguard.exporter.families.gated_delta import by_token
from vlmguard.exporter.families.generic import GenericDecoder, decoder_of
from vlmguard.exporter.families.generic_vision import image_features, traced_shapes
from vlmguard.exporter.families.image_tokens import image_token_id
from vlmguard.exporter.families.picture_geometry import replacements
from vlmguard.exporter.families.position_rules import by_place, counted, counted_from_one, find_rule
from vlmguard.graphs.errors import ModelUnreadable, ProofFailed

GRIDS = ([1, 4, 6], [1, 8, 2], [1, 2, 2])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("merge", [1, 2])
def test_places_of_patches_are_those_of_transformers(grid: list[int], merge: int) -> None:
    grids = torch.tensor([grid])
    ours = replacements(int(grids.prod()), [])
    expected = vision_utils.get_vision_position_ids(grids, merge)
    assert torch.equal(ours["get_vision_position_ids"](grids, merge), expected)
    with_frame = vision_utils.get_vision_position_ids(grids, merge, include_temporal=True)
    assert torch.equal(ours["get_vision_position_ids"](grids, merge, include_temporal=True), with_frame)
    assert torch.equal(ours["get_vision_cu_seqlens"](grids), vision_utils.get_vision_cu_seqlens(grids))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("mode", "corners", "padding"), [("bilinear", True, "border"), ("bicubic", False, "zeros")])
def test_interpolated_positions_are_those_of_transformers(
    grid: list[int], mode: str, corners: bool, padding: str
) -> None:
    grids, name = torch.tensor([grid]), "get_vision_interpolation_indices_and_weights"
    how: dict[str, Any] = {"mode": mode, "align_corners": corners, "spatial_merge_size": 2, "padding": padding}
    entries, weights = replacements(int(grids.prod()), [])[name](grids, 7, **how)
    expected_entries, expected_weights = getattr(vision_utils, name)(grids, 7, **how)
    assert torch.equal(entries, expected_entries) and torch.equal(weights, expected_weights)


RESOLUTIONS = [[8, 16], [16, 8], [16, 16], [24, 8], [8, 24]]


@pytest.mark.parametrize("size", [(30, 61), (61, 30), (17, 17), (100, 20), (9, 80), (33, 47)])
@pytest.mark.parametrize("has_separator", [True, False])
def test_tiles_are_packed_as_llava_next_packs_them(size: tuple[int, int], has_separator: bool) -> None:
    tile, side, width = 8, 4, 5
    tower = SimpleNamespace(image_size=tile, patch_size=tile // side)
    config = SimpleNamespace(vision_config=tower, image_grid_pinpoints=RESOLUTIONS)
    best = best_resolution(torch.tensor(size), RESOLUTIONS)
    tiles = int(best.prod()) // tile**2
    torch.manual_seed(0)
    features, separator = torch.randn(1 + tiles, side * side, width), torch.randn(width) if has_separator else None
    (expected,), _ = LlavaNextModel.pack_image_features(
        SimpleNamespace(config=config), [features], torch.tensor([size]), "full", separator
    )
    packed = pack(features, torch.tensor(size), RESOLUTIONS, tile, separator)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("tokens", [1, 5, 64, 130])
def test_the_delta_rule_token_by_token_is_transformers_in_chunks(tokens: int) -> None:
    """Lengths below, at and beyond one chunk and two; from a state that is not empty."""
    torch.manual_seed(0)
    query, key = torch.randn(2, tokens, 2, 8), torch.randn(2, tokens, 2, 8)
    value, decay, beta = torch.randn(2, tokens, 4, 6), -torch.rand(2, tokens, 4), torch.rand(2, tokens, 4)
    how: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    how["initial_state"] = torch.randn(2, 4, 8, 6)
    outputs, state = by_token(query, key, value, decay, beta, normed=modeling_qwen3_5.l2norm, **how)
    expected, last = modeling_qwen3_5.torch_chunk_gated_delta_rule(query, key, value, decay, beta, **how)
    assert state is not None
    torch.testing.assert_close(outputs, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(state, last, rtol=0, atol=2e-5)


IMAGE = 9


def _turn() -> Turn:
    """Two prompts with a picture of 2 x 3 and of 4 x 1 tokens, the second padded."""
    ids = np.array([[1, 2, *[IMAGE] * 6, 3, 4], [0, 0, 5, *[IMAGE] * 4, 6, 7, 8]])
    mask = np.array([[1] * 10, [0, 0, *[1] * 8]])
    given = {"image_grid_thw": np.array([[1, 4, 6], [1, 8, 2]])}
    return Turn(ids, mask, 10, given, {}, IMAGE, np.array([6, 4]))


def _config() -> Any:
    return SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2), image_token_id=IMAGE)


def test_places_of_tokens_are_those_of_get_rope_index() -> None:
    turn, config = _turn(), _config()
    expected, deltas = Qwen3VLModel.get_rope_index(
        SimpleNamespace(config=config, get_vision_position_ids=Qwen3VLModel.get_vision_position_ids.__get__(config)),
        input_ids=torch.from_numpy(turn.ids),
        mm_token_type_ids=torch.from_numpy(turn.of_image.astype(np.int64)),
        image_grid_thw=torch.from_numpy(turn.given["image_grid_thw"]),
        attention_mask=torch.from_numpy(turn.mask),
    )
    real = turn.mask.astype(bool)
    assert (by_place(config, turn)[:, real] == expected.numpy()[:, real]).all()
    ids, mask = np.pad(turn.ids, ((0, 0), (0, 1))), np.pad(turn.mask, ((0, 0), (0, 1)), constant_values=1)
    later = Turn(ids, mask, 1, turn.given, {}, IMAGE, turn.image_tokens)
    assert (by_place(config, later)[0, :, 0] == turn.mask.sum(1) + deltas.numpy()[:, 0]).all()


def test_the_rule_is_found_that_gives_the_positions_that_were_seen() -> None:
    turn, config = _turn(), _config()
    assert find_rule(config, [(turn, by_place(config, turn))]) is by_place
    assert find_rule(config, [(turn, counted(config, turn))]) is counted
    assert find_rule(config, [(turn, counted(config, turn) + 1)]) is counted_from_one
    assert find_rule(config, [(turn, counted(config, turn) + 2)]) is None
    assert find_rule(config, [(turn, None)]) is None
    # A model that numbers text in a first row of four, as Qwen3.5's generate does.
    four = np.concatenate([counted(config, turn)[None], by_place(config, turn)])
    assert find_rule(config, [(turn, four)]) is by_place


def test_an_answered_image_token_is_no_picture() -> None:
    ids = np.array([[IMAGE, IMAGE, 3, IMAGE]])
    turn = Turn(ids, np.ones_like(ids), 4, image_token=IMAGE, image_tokens=np.array([2]))
    assert turn.of_image.tolist() == [[True, True, False, False]]


def test_axes_that_differ_between_pictures_get_words() -> None:
    first = {"pixel_values": np.zeros((24, 12)), "grid": np.zeros((1, 3)), "places": np.zeros((24, 2))}
    second = {"pixel_values": np.zeros((16, 12)), "grid": np.zeros((1, 3)), "places": np.zeros((16, 2))}
    assert traced_shapes([first, second]) == {
        "pixel_values": ("num_patches", 12),
        "grid": (1, 3),
        "places": ("num_patches", 2),
    }


@pytest.mark.parametrize(
    ("leaf", "past", "present"),
    [
        ("layers.3.keys", "past_key_values.3.key", "present.3.key"),
        ("layers.3.values", "past_key_values.3.value", "present.3.value"),
        ("layers.0.conv_states.0", "past_conv.0", "present_conv.0"),
        ("layers.0.conv_states.1", "past_conv.0.1", "present_conv.0.1"),
        ("layers.2.recurrent_states.0", "past_recurrent.2", "present_recurrent.2"),
        ("layers.1.indexer_keys", "past_key_values.1.indexer_keys", "present.1.indexer_keys"),
    ],
)
def test_names_of_the_state(leaf: str, past: str, present: str) -> None:
    assert names_of(leaf) == (past, present) and present_of(past) == present


def test_the_image_token_by_its_spellings() -> None:
    text = SimpleNamespace(image_token_index=7)
    assert image_token_id(SimpleNamespace(image_token_id=5, get_text_config=lambda: text)) == 5
    assert image_token_id(SimpleNamespace(image_token_id=None, get_text_config=lambda: text)) == 7
    assert image_token_id(SimpleNamespace(get_text_config=SimpleNamespace)) is None


def test_a_failure_of_theirs_is_one_line_and_one_of_ours_is_not() -> None:
    with pytest.raises(ModelUnreadable) as caught, in_one_line("here: torch cannot export its decoder"):
        torch.zeros(2) @ torch.zeros(3)
    assert str(caught.value).startswith("here: torch cannot export its decoder (")
    assert str(caught.value).endswith(f"; {WHAT_TO_DO}") and "\n" not in str(caught.value)
    with pytest.raises(AttributeError), in_one_line("here: torch cannot export its decoder"):
        traced_shapes([{"pixel_values": 1}])  # type: ignore[dict-item]


def test_a_vision_encoder_without_features_for_the_image_tokens_is_named() -> None:
    class Sightless:
        def get_image_features(self, pixel_values: Any, return_dict: bool) -> Any:
            return SimpleNamespace(pooler_output=None)

    with pytest.raises(ModelUnreadable) as caught:
        image_features(Sightless(), pixel_values=None)
    assert str(caught.value) == (
        "Sightless: its get_image_features returns no pooler_output; export the model to ONNX with its own tools and guard "
        "that folder instead"
    )


@pytest.mark.parametrize(("unpadded", "logits"), [(None, 512), (500, 500), (600, 512)])
def test_the_rows_of_a_padded_head_are_no_logits(unpadded: int | None, logits: int) -> None:
    text = SimpleNamespace(vocab_size=512, unpadded_vocab_size=unpadded)
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda **_: text),
        get_output_embeddings=lambda: torch.nn.Linear(8, 512, bias=False),
    )
    assert _vocabulary(model) == logits


def test_a_state_of_no_width_is_compared_by_its_shape_alone() -> None:
    empty, full = np.zeros((2, 0), np.float32), np.ones((2, 3), np.float32)
    check = _compare("state", [(empty, empty, None), (full, full, None)], 1e-4, "")
    assert (check.compared, check.worst) == (6, 0.0)
    with pytest.raises(ProofFailed, match="nothing was compared"):
        _compare("state", [(empty, empty, None)], 1e-4, "")
    with pytest.raises(ProofFailed, match="torch gives shape"):
        _compare("state", [(empty, full, None)], 1e-4, "")


@pytest.mark.parametrize("model_type", ["aya_vision", "qwen3_vl_moe", "gemma4"])
def test_a_model_that_answers_with_an_image_token_reads_what_transformers_reads(model_type: str) -> None:
    """Behind the prompt no picture's row replaces it. Gemma 4 alone reads padding there."""
    model = small_model(model_type)
    token = image_token_id(model.config)
    assert token is not None
    model.config.image_token_id = token
    per_layer = model_type == "gemma4"
    ids = torch.tensor([[5, token, 7]])
    seen: list[torch.Tensor] = []
    handle = decoder_of(model).register_forward_pre_hook(
        lambda _, args, named: seen.append(named["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids)
        handle.remove()
        embeds = GenericDecoder(None, per_layer=per_layer).embeds(model, ids)["inputs_embeds"]
    assert torch.equal(embeds, seen[0])


def test_an_image_token_beyond_the_table_is_looked_up_as_padding() -> None:
    model: Any = torch.nn.Module()
    model.table = table = torch.nn.Embedding(8, 4)
    text = SimpleNamespace(pad_token_id=3)
    model.config = SimpleNamespace(image_token_id=9, get_text_config=lambda: text)
    model.get_input_embeddings = lambda: table
    embeds = GenericDecoder(None).embeds(model, torch.tensor([[1, 9]]))["inputs_embeds"]
    assert torch.equal(embeds[0], table(torch.tensor([1, 3])))
