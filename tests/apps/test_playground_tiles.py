"""SmolVLM's layout in the playground's page, in Chromium: pixels, prompts, logits and answers are `GuardedVLM`'s.

The pure functions behind it, without a browser, are `test_playground_pictures.py`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, NO_CHROMIUM, Browser
from PIL import Image

from integrations.browser.check import ask_about_tiles, page_of
from integrations.tiny_smolvlm import write_smolvlm
from vlmguard.apps.playground.libraries import find_libraries
from vlmguard.graphs.errors import GuardError
from vlmguard.runtime.guarded import GuardedVLM

pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

READY = "[data-ready=true]"


@pytest.fixture(scope="module", autouse=True)
def libraries() -> Iterator[None]:
    """In the user's cache: fetched at the first run of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLMGUARD_CACHE", raising=False)
        try:
            find_libraries()
        except GuardError as error:
            pytest.skip(f"the page's libraries are not in the cache, and {error}")
        yield


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smolvlm(tmp_path_factory.mktemp("smolvlm") / "smolvlm")


@pytest.mark.parametrize("provider", ["wasm", "webgpu"])
def test_both_sides_compute_what_python_computes(smolvlm: Path, provider: str) -> None:
    """Logits of prefill and every step and tokens, on WebAssembly and on a GPU; answers end at `<end_of_utterance>`.

    Text comes after pictures: on WebGPU the vision encoder's `And` must not change the decoder's (`cpuNodes` of facts.json).
    """
    with Browser(gpu=provider == "webgpu") as browser:
        agreement = ask_about_tiles(browser, smolvlm, provider)
    assert agreement.ok and agreement.tokens > 100, agreement


def test_pixels_and_prompts_are_pythons(smolvlm: Path) -> None:
    """The page's modules with a picture's file: the same float32 numbers, the same cut, the same ids, the same answer."""
    code = """async ({ picture, prompt }) => {
      const { Chat } = await import("/chat.mjs");
      const { Engine } = await import("/engine.mjs");
      const { readPicture } = await import("/picture.mjs");
      const { preparePicture } = await import("/prepare.mjs");
      const facts = await (await fetch("/model/facts.json")).json();
      const chat = new Chat(await (await fetch("/model/tokenizer.json")).json(), facts.chat);
      const blob = new Blob([Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0))]);
      const { arrays, grid } = preparePicture(await readPicture(blob, "picture"), facts.image);
      const shown = Object.entries(arrays).map(([name, { dims, data }]) => [name, { dims, data: Array.from(data) }]);
      window.engine ??= new Engine("wasm");
      let answer = "";
      for await (const { side, text } of window.engine.ask({ prompt, picture: blob, most: 12 })) {
        if (side === "guarded") answer = text;
      }
      const tiles = arrays.pixel_values.dims[1];
      return { arrays: Object.fromEntries(shown), grid, ids: chat.encode(prompt, { count: tiles * 4, grid }), answer };
    }"""
    vlm = GuardedVLM.open(smolvlm / "model")
    cases = json.loads((smolvlm / "cases.json").read_text(encoding="utf-8"))["cases"]
    cuts = set()
    with page_of(smolvlm / "model") as url, Browser() as browser:
        page = browser.open(url, READY, 1200)
        for case in cases:
            if case["image"] is None:
                continue
            path = smolvlm / "images" / case["image"]
            content = base64.b64encode(path.read_bytes()).decode()
            shown = page.evaluate(code, {"picture": content, "prompt": case["prompt"]})
            expected = vlm.images.prepare(Image.open(path))
            assert shown["arrays"].keys() == expected.arrays.keys() and tuple(shown["grid"]) == expected.grid
            for name, array in expected.arrays.items():
                values = np.array(shown["arrays"][name]["data"], array.dtype).reshape(shown["arrays"][name]["dims"])
                np.testing.assert_array_equal(values, array)
            assert shown["ids"] == case["input_ids"] and shown["answer"].strip() == case["answer"]
            cuts.add(expected.grid)
        assert browser.said == []
    assert len(cuts) >= 5
