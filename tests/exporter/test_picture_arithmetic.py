"""What stands in for transformers' loops and complex numbers in vision encoders and decoders, against transformers' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import vision_utils
from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLModel
from transformers.models.kimi_k25 import modeling_kimi_k25
from transformers.models.llama4 import modeling_llama4
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6Merger
from transformers.models.muse_glimmer import modeling_muse_glimmer
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts
from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3VisionModel

from vlmguard.exporter.checkpoints.small_constants import small_constants_kept
from vlmguard.exporter.families.complex_pairs import complex_as_pairs
from vlmguard.exporter.families.family import IMAGE_FEATURES, Turn
from vlmguard.exporter.families.generic_vision import image_features
from vlmguard.exporter.families.grouped_experts import experts_in_groups, has_own_loop
from vlmguard.exporter.families.picture_geometry import pixel_unshuffle, replacements, temporal_merge
from vlmguard.exporter.families.position_rules import by_image, find_rule
from vlmguard.exporter.families.sub_pictures import _merged, nearest_positions, places, window_order

SUB_PICTURES = torch.tensor([[4, 6], [2, 2], [8, 4]], dtype=torch.int32)
PATCHES = int(SUB_PICTURES.prod(dim=1).sum())
IMAGE = 9


@pytest.mark.parametrize("grid", [[1, 4, 6], [1, 8, 2], [1, 2, 2]])
def test_squares_of_patches_are_those_of_transformers(grid: list[int]) -> None:
    grids = torch.tensor([grid])
    ours = replacements(int(grids.prod()), [])
    assert torch.equal(ours["get_vision_frame_index"](grids), modeling_kimi_k25.get_vision_frame_index(grids))
    sources, theirs = (
        merge_index(grids, 2, 2)
        for merge_index in (
            ours["get_vision_temporal_merge_index"],
            modeling_kimi_k25.get_vision_temporal_merge_index,
        )
    )
    if isinstance(theirs, tuple):  # since transformers 5.24: where each patch goes, not where it comes from
        assert torch.equal(theirs[0][sources.flatten()], torch.arange(sources.numel()))
        states = torch.randn(sources.numel(), 5)
        expected = modeling_kimi_k25.Kimi_K25VisionModel.temporal_merge(SimpleNamespace(), states, grids, 2, 2)
        assert torch.equal(temporal_merge(states, grids, 2, 2), expected)
    else:
        assert torch.equal(sources, theirs)
    shuffled = modeling_muse_glimmer.get_vision_pixel_shuffle_index(grids, 2)
    assert torch.equal(ours["get_vision_pixel_shuffle_index"](grids, 2), shuffled)


@pytest.mark.parametrize("merge", [1, 2, 3, 4])
def test_merged_squares_are_those_of_video_llama_3(merge: int) -> None:
    torch.manual_seed(0)
    grids, merges = torch.tensor([[1, 12, 24]]), torch.tensor([merge])
    states = torch.randn(12 * 24, 5)
    expected = VideoLlama3VisionModel.pixel_unshuffle(SimpleNamespace(), states, grids, merges)
    torch.testing.assert_close(pixel_unshuffle(states, grids, merges), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("edge", [1, 2])
def test_windows_of_several_sub_pictures_are_in_the_order_of_transformers(edge: int) -> None:
    grids = torch.nn.functional.pad(SUB_PICTURES, (1, 0), value=1)
    expected, _ = vision_utils.get_vision_window_index(grids, 1, edge, 1)
    assert torch.equal(window_order(SUB_PICTURES, PATCHES, edge), expected)


@pytest.mark.parametrize("side", [3, 7, 70])
def test_each_patch_of_a_sub_picture_reads_the_entry_that_transformers_reads(side: int) -> None:
    expected = vision_utils.get_vision_nearest_position_ids(SUB_PICTURES, side)
    assert torch.equal(nearest_positions(SUB_PICTURES, side, PATCHES), expected)
    assert places(SUB_PICTURES, PATCHES).start.unique().tolist() == [0, 24, 28]


def test_sub_pictures_are_merged_as_minicpm_merges_them() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(
        merge_kernel_size=(2, 2),
        merger_times=2,
        vision_config=SimpleNamespace(hidden_size=3),
        text_config=SimpleNamespace(hidden_size=5),
    )
    sizes = torch.tensor([[4, 8], [8, 4]])
    merger, states = MiniCPMV4_6Merger(config), torch.randn(1, 64, 3)
    (rows,) = _merged(merger, states, sizes)
    torch.testing.assert_close(rows, torch.cat(merger(states, sizes)), rtol=0, atol=1e-6)


def _rotated(rotation: Any, angles: torch.Tensor, query: torch.Tensor, key: torch.Tensor, table: Any) -> list[Any]:
    scaled = torch.polar(torch.ones_like(angles), angles) * 0.5
    seen = modeling_llama4.vision_apply_rotary_emb(query, key, table.freqs_ci.to("cpu"))
    return [*rotation(query, key, scaled), *seen]


def test_rotations_by_pairs_are_those_by_complex_numbers() -> None:
    torch.manual_seed(0)
    query, key, angles = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 4)
    table = torch.nn.Module()
    numbers = torch.polar(torch.ones(5, 1, 4), torch.randn(5, 1, 4))
    table.register_buffer("freqs_ci", numbers, persistent=False)
    inputs = (modeling_llama4.apply_rotary_emb, angles, query, key, table)
    expected = _rotated(*inputs)
    with complex_as_pairs(table):
        assert not dict(table.named_buffers())
        pairs = _rotated(*inputs)
    for ours, theirs in zip(pairs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert table.freqs_ci is numbers and torch.view_as_complex is not None and torch.is_complex(_complex())


def _complex() -> torch.Tensor:
    return torch.view_as_complex(torch.zeros(1, 2))


def test_experts_in_groups_are_those_of_the_loop() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(num_local_experts=4, hidden_size=8, moe_intermediate_size=8, hidden_act="silu")
    experts = Step3p7Experts(config, swiglu_limit=0.5)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn_like(weight))
        states, index, weights = torch.randn(7, 8), torch.randint(0, 4, (7, 2)), torch.rand(7, 2)
        expected = experts(states, index, weights)
        assert has_own_loop(experts)
        with experts_in_groups(experts):
            grouped = experts(states, index, weights)
    torch.testing.assert_close(grouped, expected, rtol=0, atol=1e-5)
    assert not hasattr(experts, "has_gate") and "forward" not in vars(experts)


def test_positions_with_four_axes_are_those_of_get_rope_index() -> None:
    """Two prompts with two pictures and with one; the grids are of 2 x 3 tokens and of 4 x 1, with and without borders."""
    bordered, plain = [IMAGE] * (2 * 4 + 2), [IMAGE] * (4 * 2)
    rows = [[1, 2, *bordered, 3, *plain, 4], [5, *bordered, 6, 7]]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    mask = (ids > 0).astype(np.int64)
    grids = np.array([[1, 4, 6], [1, 8, 2], [1, 4, 6]])
    rotary = SimpleNamespace(rope_parameters={"mrope_section": [2, 2, 2, 2]})
    config = SimpleNamespace(text_config=rotary, vision_config=SimpleNamespace(spatial_merge_size=2))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = HunYuanVLModel.get_vision_position_ids.__get__(model)
    expected, deltas = HunYuanVLModel.get_rope_index(
        model,
        torch.from_numpy(ids),
        torch.from_numpy((ids == IMAGE).astype(np.int64)),
        torch.from_numpy(grids),
        torch.from_numpy(mask),
    )
    turn = Turn(ids, mask, width, {"image_grid_thw": grids}, {}, IMAGE, (ids == IMAGE).sum(1))
    assert (by_image(config, turn) == expected.numpy()).all()
    assert find_rule(config, [(turn, expected.numpy())]) is by_image
    assert (deltas == 0).all()  # text goes on with the tokens' numbers, as a caller counts them


class Sighted:
    """Returns what Llama 4 or Granite 4 Vision return from `get_image_features`."""

    def __init__(self, output: Any, multiplier: float = 1.0) -> None:
        self.output = output
        text = SimpleNamespace(embedding_multiplier=multiplier)
        self.config = SimpleNamespace(get_text_config=lambda: text, vision_config=SimpleNamespace())

    def get_image_features(self, pixel_values: Any, return_dict: bool) -> Any:
        return self.output

    def multi_modal_projector(self, states: torch.Tensor) -> torch.Tensor:
        return states * 2


def test_states_of_an_encoder_go_through_the_models_projector() -> None:
    states = torch.ones(2, 3, 4)
    output = SimpleNamespace(pooler_output=None, last_hidden_state=states)
    features = image_features(Sighted(output), pixel_values=None)
    assert torch.equal(features[IMAGE_FEATURES], torch.full((6, 4), 2.0))


@pytest.mark.parametrize("first", [0, 3])
def test_features_in_front_of_a_layer_go_behind_the_one_before_it(first: int) -> None:
    """Those in front of the first layer are the image tokens' embeddings, which the decoder scales."""
    rows = [torch.full((6, 4), number) for number in (1.0, 2.0)]
    output = SimpleNamespace(pooler_output=None, deepstack_features=[(first, [rows[0]]), (5, rows[1])])
    features = image_features(Sighted(output, multiplier=4.0), pixel_values=None)
    if first == 0:
        assert torch.equal(features.pop(IMAGE_FEATURES), rows[0] / 4)
    else:
        assert not features.pop(IMAGE_FEATURES).any()
        assert torch.equal(features.pop("deepstack_features_2"), rows[0])
    assert list(features) == ["deepstack_features_4"] and torch.equal(features["deepstack_features_4"], rows[1])


class Normed(torch.nn.Module):
    """Adds a small number and none."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8) + 0


def test_a_small_epsilon_stays_in_the_graph() -> None:
    with small_constants_kept():
        program = torch.onnx.export(Normed().eval(), (torch.ones(2, 3),), dynamo=True, verbose=False)
    assert program is not None
    kinds = [node.op_type for node in program.model.graph]
    assert kinds.count("Add") == 1  # the optimizer still drops the addition of 0
