"""The text around a picture's tokens: the same as transformers' `replace_image_token` writes, for every processor of the table.

Most processor classes cannot be made without torchvision (they have a video processor). Their rule needs none of that: it is
called on a stand-in that has the markers alone.
"""

from __future__ import annotations

import ast
import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers

from vlmguard.graphs.errors import GuardError
from vlmguard.runtime.chat.picture_layouts import PictureTokens, token_grid
from vlmguard.runtime.chat.picture_markers import LAYOUTS, Placeholder

Rule = Callable[[SimpleNamespace, PictureTokens], dict[str, Any]]


def placeholder(kind: str, **markers: str) -> Placeholder:
    """As a folder gives it whose configs name every marker by its usual text, or `<name>` where it has none."""
    layout = LAYOUTS[kind]
    texts = {marker: markers.get(name, usual or f"<{name}>") for marker, (name, usual) in layout.markers.items()}
    image = layout.image[1] if layout.image is not None else "<T>"
    return Placeholder(layout.written[1] if layout.written else image, image, layout, texts)


def theirs(kind: str) -> Any:
    """The class, from the module that defines it; its methods alone where that module needs torchvision."""
    folder = Path(transformers.__file__).parent / "models"
    files = sorted(folder.glob("*/processing_*.py"))
    path = next(path for path in files if f"\nclass {kind}(" in path.read_text(encoding="utf-8"))
    try:
        return getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), kind)
    except ModuleNotFoundError:
        module = ast.parse(path.read_text(encoding="utf-8"))
        (cls,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == kind)
        names: dict[str, Any] = {}
        rule: list[ast.stmt] = [
            node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "replace_image_token"
        ]
        exec(compile(ast.Module(rule, []), str(path), "exec"), names)
        return SimpleNamespace(**names)


def _by_grid(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    stand.image_processor = SimpleNamespace(merge_size=2, spatial_patch_size=1, downsample_ratio=0.5)
    grid = np.array([[1, 2 * tokens.count, 2]])
    return {"image_grid_thw": grid, "image_grid_hw": grid[:, 1:]}


def _by_number(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    for name in ("image_seq_length", "num_image_tokens", "image_seq_len"):
        setattr(stand, name, tokens.count)
    return {"num_soft_tokens_per_image": [tokens.count], "num_img_tokens": [tokens.count], "num_crops": [0]}


def _by_tiles(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    """So many tiles of the same number of tokens."""
    parts = max(len(tokens.sizes), 1)
    stand.image_seq_length = stand.image_seq_len = each = tokens.count // parts
    stand.img_size, stand.patch_size = math.isqrt(each), 1
    rows, columns = tokens.grid or (0, 0)
    return {"num_patches": [parts], "rows": [[rows]], "cols": [[columns]]}


def _cohere2(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    parts = max(len(tokens.sizes), 1)
    stand.patch_size = math.isqrt(tokens.count // parts)
    return {"num_patches": [parts]}


def _granite_docling(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    inputs = _by_tiles(stand, tokens)
    return inputs if tokens.grid else {**inputs, "rows": [[1]], "cols": [[1]]}


def _ovis2(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    stand.image_seq_length = tokens.count // max(len(tokens.sizes), 1)
    return {"grids": np.array([tokens.grid or (1, 1)])}


def _llama4(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    each = tokens.count // max(len(tokens.sizes), 1)
    stand.patch_size = stand.downsample_ratio = 1
    stand._prompt_split_image = lambda *given: theirs("Llama4Processor")._prompt_split_image(stand, *given)
    return {"pixel_values": np.zeros((1, 3, each, 1)), "aspect_ratios": [tokens.grid or (1, 1)]}


def _minicpm(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    stand.slice_mode = True
    parts = tokens.sizes or (1,)
    counts = [tokens.count * size // sum(parts) for size in parts]
    return {
        "grids": [tokens.grid or (0, 0)],
        "num_patches_per_image": np.array([len(parts)]),
        "target_sizes": np.array([(count, 16) for count in counts]),
    }


def _lfm2(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    """Tiles of 4 tokens, a small copy of any number."""
    whole = tokens.sizes[-1] if tokens.grid else tokens.count
    stand.image_processor = SimpleNamespace(use_thumbnail=True, tile_size=4, downsample_factor=2, encoder_patch_size=1)
    kind = theirs("Lfm2VlProcessor")
    for name in (
        "_get_image_num_tokens",
        "_compute_tokens_per_tile",
        "_compute_tokens_for_image",
        "_build_image_tokens",
    ):
        setattr(stand, name, getattr(kind, name).__get__(stand))
    rows, columns = tokens.grid or (1, 1)
    return {"image_rows": [rows], "image_cols": [columns], "image_sizes": [(2 * whole, 2)]}


def _pixtral(stand: SimpleNamespace, tokens: PictureTokens) -> dict[str, Any]:
    stand.patch_size, stand.spatial_merge_size = 7, 2
    assert tokens.grid is not None
    return {"image_sizes": [(tokens.grid[0] * 14, tokens.grid[1] * 14)]}


ALONE = PictureTokens(4)
CUT = PictureTokens(7 * 4, (2, 3), (1,) * 7)
UNEQUAL = PictureTokens(6 * 4 + 3, (2, 3), (4,) * 6 + (3,))
UNEQUAL_FIRST = PictureTokens(6 * 4 + 3, (2, 3), (3,) + (4,) * 6)
GRID = PictureTokens(6, (2, 3))
GRIDS = [
    "Qwen2VLProcessor",
    "Qwen2_5_VLProcessor",
    "Qwen3VLProcessor",
    "Qwen2_5OmniProcessor",
    "Qwen3OmniMoeProcessor",
    "Glm4vProcessor",
    "Glm46VProcessor",
    "Glm5NextProcessor",
    "PaddleOCRVLProcessor",
    "VideoLlama3Processor",
    "Exaone4_5_Processor",
    "Ernie4_5_VLMoeProcessor",
    "HyperCLOVAXVisionV2Processor",
    "Lfm3VlProcessor",
    "CohereCompassProcessor",
    "Cosmos3EdgeProcessor",
    "Dots3NoteProcessor",
    "Kimi_K25Processor",
    "MuseGlimmerProcessor",
    "NemotronH_Omni_Reasoning_V3Processor",
]
NUMBERS = [
    "DeepseekVLProcessor",
    "DeepseekVLHybridProcessor",
    "Gemma4Processor",
    "Gemma4UnifiedProcessor",
    "JanusProcessor",
    "ChameleonProcessor",
    "PaliGemmaProcessor",
    "Phi4MultimodalProcessor",
]
# How each rule is asked, and with what pictures.
RULES: dict[str, tuple[Rule, tuple[PictureTokens, ...]]] = {
    **dict.fromkeys(GRIDS, (_by_grid, (ALONE,))),
    **dict.fromkeys(NUMBERS, (_by_number, (ALONE,))),
    "InternVLProcessor": (_by_tiles, (ALONE, CUT)),
    "QianfanOCRProcessor": (_by_tiles, (ALONE, CUT)),
    "Idefics3Processor": (_by_tiles, (ALONE, CUT)),
    "SmolVLMProcessor": (_by_tiles, (ALONE, CUT)),
    "GraniteDoclingProcessor": (_granite_docling, (ALONE, CUT, PictureTokens(4, (1, 1), (1,)))),
    "AyaVisionProcessor": (_by_tiles, (ALONE, CUT)),
    "Cohere2VisionProcessor": (_cohere2, (ALONE, CUT)),
    "Lfm2VlProcessor": (_lfm2, (ALONE, UNEQUAL)),
    "Ovis2Processor": (_ovis2, (ALONE, CUT)),
    "Llama4Processor": (_llama4, (ALONE, CUT)),
    "MiniCPMV4_6Processor": (_minicpm, (ALONE, CUT, UNEQUAL_FIRST)),
    "PixtralProcessor": (_pixtral, (GRID, PictureTokens(5, (5, 1)))),
}
# Rules that count tokens in a way that only the whole processor can: they write nothing but those tokens.
COUNTED = {
    "LlavaProcessor",
    "LlavaNextProcessor",
    "LlavaOnevisionProcessor",
    "LightOnOcrProcessor",
    "DeepseekOcr2Processor",
    "PerceptionLMProcessor",
    "Granite4VisionProcessor",
    "HunYuanVLProcessor",
    "AriaProcessor",
}
# Rules that are written elsewhere than in `replace_image_token`; the tests below spell them out.
SPELLED = {"Gemma3Processor", "Gemma3nProcessor", "Idefics2Processor"}


def test_every_processor_of_the_table_is_compared() -> None:
    assert {*RULES, *COUNTED, *SPELLED} == set(LAYOUTS)
    assert all(LAYOUTS[kind] == LAYOUTS["LlavaProcessor"] for kind in COUNTED)


@pytest.mark.parametrize("kind", RULES)
def test_transformers_writes_the_same(kind: str) -> None:
    rule, pictures = RULES[kind]
    mine = placeholder(kind)
    for picture in pictures:
        markers = {name: mine.markers[marker] for marker, (name, _) in mine.layout.markers.items()}
        stand = SimpleNamespace(image_token=mine.image, **markers)
        stand.global_image_tag = markers.get("global_image_token")
        stand.img_patch_token = stand.image_token
        stand.IMAGE_TOKEN = stand.image_token
        stand.tokenizer = stand
        # attributes that go by another name than the tokenizer's
        stand.image_start_token = markers.get("image_start_token", markers.get("boi_token"))
        stand.image_end_token = markers.get("image_end_token", markers.get("eoi_token"))
        more = {"image_token_divisor": 16} if rule is _minicpm else {}
        more |= {"use_image_special_tokens": True} if rule is _lfm2 else {}
        inputs = rule(stand, picture)
        assert mine.text_of(picture) == theirs(kind).replace_image_token(stand, inputs, 0, **more), picture


def test_rules_that_are_spelled_out() -> None:
    gemma = placeholder("Gemma3Processor", boi_token="<start>", eoi_token="<end>")
    assert (gemma.text_of(ALONE), gemma.written) == ("\n\n<start><T><T><T><T><end>\n\n", "")
    assert replace(gemma, layout=LAYOUTS["Gemma3nProcessor"]).text_of(ALONE) == "\n\n<start><T><T><T><T><end>\n\n"
    idefics2 = placeholder("Idefics2Processor")
    around = "<fake_token_around_image>"
    assert idefics2.text_of(ALONE) == f"{around}<T><T><T><T>{around}"
    assert idefics2.text_of(PictureTokens(4, (1, 2), (1, 1))) == f"{around}<T><T>{around}<T><T>{around}"
    assert idefics2.filled("a<T><T>b", [PictureTokens(1)] * 2) == f"a{around}<T>{around}<T>{around} b"


def test_placeholders_are_replaced_in_order() -> None:
    lfm2 = placeholder("Lfm2VlProcessor")
    text = lfm2.filled("a <T> b <T> c", [PictureTokens(1), PictureTokens(2)])
    assert text == "a <|image_start|><T><|image_end|> b <|image_start|><T><T><|image_end|> c"


def test_every_marker_is_in_the_text_that_prompts_must_not_contain() -> None:
    idefics3 = placeholder("Idefics3Processor").every_marker()
    assert all(marker in idefics3 for marker in ("<row_1_col_1>", "<row_12_col_12>", "<global-img>", "<T>"))
    assert "[IMG_BREAK]" in placeholder("PixtralProcessor").every_marker()


def test_tokens_that_do_not_fill_their_parts_are_refused() -> None:
    with pytest.raises(
        GuardError, match="29 image tokens cannot be divided into 7 parts of sizes 1, 1, 1, 1, 1, 1, 1;"
    ):
        placeholder("Idefics3Processor").text_of(PictureTokens(29, (2, 3), (1,) * 7))
    with pytest.raises(GuardError, match="gives 5 rows for 2 x 3 image tokens;"):
        placeholder("PixtralProcessor").text_of(PictureTokens(5, (2, 3)))


@pytest.mark.parametrize("edge", [1, 14, 28])
def test_rows_and_columns_of_tokens_follow_from_their_number(edge: int) -> None:
    for rows, columns in ((1, 1), (3, 5), (40, 7), (1, 37)):
        assert token_grid((rows * edge, columns * edge), rows * columns) == (rows, columns)
    assert token_grid((28, 28), 3) is None and token_grid((1, 1), 4) is None and token_grid((8, 8), 0) is None
