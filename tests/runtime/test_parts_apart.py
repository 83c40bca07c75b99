"""A picture in parts that a vision encoder takes one at a time: one call each, and the rows in the order of the parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmguard.runtime.images.images_lfm2 import LFM2_PROCESSOR
from vlmguard.runtime.images.vision import look, open_preprocessor
from vlmguard.runtime.runner_protocol import Port

WIDTH = 6
OPTIONS = {
    "encoder_patch_size": 4,
    "tile_size": 16,
    "min_image_tokens": 2,
    "max_image_tokens": 4,
    "max_num_patches": 16,
}


class Encoder:
    """Each part's tokens have the mean of its pixels."""

    def __init__(self, parts: int | None) -> None:
        self.inputs = {
            "pixel_values": Port("pixel_values", np.dtype(np.float32), (parts, None, 48)),
            "spatial_shapes": Port("spatial_shapes", np.dtype(np.int64), (parts, 2)),
        }
        self.outputs: dict[str, Port] = {}
        self.calls: list[int] = []

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(len(feeds["pixel_values"]))
        tokens = feeds["spatial_shapes"].prod(axis=1) // 4
        means = feeds["pixel_values"].mean(axis=(1, 2))
        return {"image_features": np.repeat(means, tokens)[:, None] * np.ones((1, WIDTH), np.float32)}


@pytest.mark.parametrize("size", [(16, 16), (64, 40)])
def test_a_graph_for_one_part_gives_the_rows_of_one_for_all(tmp_path: Path, size: tuple[int, int]) -> None:
    content = {"image_processor_type": LFM2_PROCESSOR, **OPTIONS}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    preprocessor = open_preprocessor(tmp_path)
    parts = len(preprocessor.prepare(picture).arrays["pixel_values"])
    assert (parts > 1) == (size != (16, 16))
    one, all_at_once = Encoder(1), Encoder(None)
    seen, expected = (look(encoder, preprocessor, [(picture, True)], None) for encoder in (one, all_at_once))
    assert one.calls == [1] * parts and all_at_once.calls == [parts]
    np.testing.assert_array_equal(seen.features, expected.features)
    assert seen.pictures == expected.pictures
