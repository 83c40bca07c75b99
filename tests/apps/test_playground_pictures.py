"""The page's pictures in Node.js: pixels, tiles and the text around them are those of `runtime/images` and `runtime/chat`.

The same modules in Chromium, with a model behind them, are `test_playground_tiles.py`.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmguard.apps.playground import open as opening
from vlmguard.apps.playground.picture_facts import image_facts, layout_facts
from vlmguard.runtime.chat.picture_layouts import PictureTokens, Tiles
from vlmguard.runtime.chat.picture_markers import LAYOUTS, Placeholder
from vlmguard.runtime.images.prepared_picture import Preprocessor
from vlmguard.runtime.images.vision import open_preprocessor

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
PAGE = Path(opening.__file__).with_name("page")

# `(width, height)`: smaller than a tile, a tile, larger, odd, very wide, very tall.
SIZES = ((28, 28), (7, 5), (1, 1), (97, 31), (31, 97), (120, 80), (90, 200), (199, 61), (300, 7), (64, 65))
_TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "idefics3": {"image_processor_type": "Idefics3ImageProcessor", **_TILES},
    "smolvlm": {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 90},
        "max_image_size": {"longest_edge": 28},
        "image_mean": [0.1, 0.2, 0.3],
    },
    "not resized": {"image_processor_type": "Idefics3ImageProcessor", **_TILES, "do_resize": False, "resample": 3},
    "not cut": {"image_processor_type": "SmolVLMImageProcessor", **_TILES, "do_image_splitting": False},
    "not normalised": {"image_processor_type": "Idefics3ImageProcessor", **_TILES, "do_normalize": False},
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, "crop_size": 20},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 28}},
}
MARKED = [name for name, row in LAYOUTS.items() if isinstance(row.layout, Tiles) and not row.merged]


def in_node(code: str, given: Any) -> Any:
    """The value of an async function's body, in which `given` is this value and `page(NAME)` imports a module of the page."""
    program = f"""
      let text = "";
      for await (const piece of process.stdin) text += piece;
      const given = JSON.parse(text);
      const page = (name) => import({json.dumps(PAGE.as_uri())} + "/" + name);
      const value = await (async () => {{ {code} }})();
      process.stdout.write(JSON.stringify(value));
    """
    done = subprocess.run(
        ["node", "--input-type=module", "-e", program],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def rgba(picture: Image.Image) -> dict[str, Any]:
    return {"width": picture.width, "height": picture.height, "data": encoded(picture.convert("RGBA").tobytes())}


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(5)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)) for width, height in SIZES]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_pythons(tmp_path: Path, name: str) -> None:
    """Every array bit for bit, and how the picture is cut."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    processor: Preprocessor = open_preprocessor(tmp_path)
    code = """
      const { preparePicture } = await page("prepare.mjs");
      const bytes = ({ buffer, byteOffset, byteLength }) => Buffer.from(buffer, byteOffset, byteLength).toString("base64");
      return given.pictures.map(({ width, height, data }) => {
        const pixels = new Uint8ClampedArray(Buffer.from(data, "base64"));
        const { arrays, grid } = preparePicture({ width, height, data: pixels }, given.facts);
        const shown = Object.entries(arrays).map(([name, { dims, data }]) => [name, { dims, data: bytes(data) }]);
        return { grid, arrays: Object.fromEntries(shown) };
      });
    """
    given = {"facts": image_facts(processor), "pictures": [rgba(picture) for picture in pictures()]}
    grids = set()
    for picture, seen in zip(pictures(), in_node(code, given), strict=True):
        expected = processor.prepare(picture)
        assert seen["arrays"].keys() == expected.arrays.keys()
        for key, array in expected.arrays.items():
            dtype = np.float32 if key == "pixel_values" else np.uint8
            values = np.frombuffer(base64.b64decode(seen["arrays"][key]["data"]), dtype)
            np.testing.assert_array_equal(
                values.reshape(seen["arrays"][key]["dims"]), array, err_msg=f"{picture} {key}"
            )
        assert (None if seen["grid"] is None else tuple(seen["grid"])) == expected.grid
        grids.add(expected.grid)
    assert len(grids) > 4 or name in ("not cut", "clip", "siglip")


def test_the_text_of_tiles_is_pythons() -> None:
    """Every layout of tiles that has one number of tokens for all of them: not cut, one tile, a row, a column, a grid."""
    grids = (None, (1, 1), (1, 3), (2, 1), (3, 2))
    rows = []
    for name in MARKED:
        layout = LAYOUTS[name]
        markers = {marker: text or f"<{marker}>" for marker, (_, text) in layout.markers.items()}
        placeholder = Placeholder("<image>", "<image>", layout, markers)
        pictures = [PictureTokens(840, grid) for grid in grids]  # 840: whole tiles, whatever the layout
        rows.append((name, placeholder, pictures))
    given = [
        {"layout": layout_facts(placeholder), "pictures": [{"count": p.count, "grid": p.grid} for p in pictures]}
        for _, placeholder, pictures in rows
    ]
    code = """
      const { pictureText } = await page("markers.mjs");
      return given.map(({ layout, pictures }) => pictures.map((picture) => pictureText(picture, "<image>", layout)));
    """
    for (name, placeholder, pictures), texts in zip(rows, in_node(code, given), strict=True):
        assert texts == [placeholder.text_of(picture) for picture in pictures], name
    assert {"Idefics3Processor", "SmolVLMProcessor", "GraniteDoclingProcessor"} <= {name for name, *_ in rows}


def test_tokens_that_fill_no_tiles_are_refused() -> None:
    layout = LAYOUTS["SmolVLMProcessor"]
    facts = layout_facts(Placeholder("<image>", "<image>", layout, {"around": "<around>", "whole": "<whole>"}))
    code = """
      const { pictureText } = await page("markers.mjs");
      try { return pictureText({ count: 7, grid: [1, 2] }, "<image>", given); } catch (error) { return error.message; }
    """
    assert in_node(code, facts) == (
        "The picture's 7 image tokens cannot be divided among 3 tiles; the image processor is not this model's."
    )
