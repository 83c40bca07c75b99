"""The text that stands for a picture: image tokens, and the markers that each processor class writes around them.

A chat template writes one placeholder for each picture. The processor puts the picture's image tokens there, as many as the
vision encoder gives rows, with markers that depend on how the picture was cut. `LAYOUTS` is the only table of those rules, by
the `processor_class` of a model folder; the rules are those of `replace_image_token` of transformers' processors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .picture_layouts import Flat, PictureLayout, PictureTokens, Rows, Tiles

_AROUND = {"around": ("fake_image_token", "<fake_token_around_image>")}
_ROW_AND_COLUMN = "{around}<row_{row}_col_{column}>{tokens}"
_PLAIN = PictureLayout()
_IDEFICS3 = PictureLayout(
    Tiles(
        tile=_ROW_AND_COLUMN,
        after_row="\n",
        whole="\n{around}{whole}{tokens}{around}",
        alone="{around}{whole}{tokens}{around}",
    ),
    {**_AROUND, "whole": ("global_image_token", "<global-img>")},
)
_GRANITE_DOCLING = PictureLayout(
    Tiles(
        tile=_ROW_AND_COLUMN,
        after_row="\n",
        whole="\n{around}{whole}{tokens}{around}",
        alone="{around}<row_1_col_1>{tokens}\n",
        alone_as_tile=True,
    ),
    _IDEFICS3.markers,
)
_GEMMA3 = PictureLayout(
    Flat("\n\n{start}{tokens}{end}\n\n"),
    {"start": ("boi_token", ""), "end": ("eoi_token", "")},
    written=("boi_token", ""),
)
_MARKED = Flat("{start}{tokens}{end}")
_GEMMA4 = PictureLayout(_MARKED, {"start": ("boi_token", "<|image>"), "end": ("eoi_token", "<image|>")})
_INTERNVL = PictureLayout(
    _MARKED,
    {"start": ("start_image_token", "<img>"), "end": ("end_image_token", "</img>")},
    written=("context_image_token", "<IMG_CONTEXT>"),
    image=("context_image_token", "<IMG_CONTEXT>"),
)
_LFM2 = PictureLayout(
    Tiles(
        start="{start}",
        tile="<|img_row_{row}_col_{column}|>{tokens}",
        whole="{whole}{tokens}",
        alone="{tokens}",
        end="{end}",
    ),
    {
        "start": ("image_start_token", "<|image_start|>"),
        "end": ("image_end_token", "<|image_end|>"),
        "whole": ("image_thumbnail_token", "<|img_thumbnail|>"),
    },
)
_AYA = PictureLayout(
    Tiles(
        start="{start}",
        tile="{tile}_{number}{tokens}",
        whole="{whole}{tokens}",
        alone="{whole}{tokens}",
        end="{end}",
    ),
    {
        "start": ("start_of_img_token", "<|START_OF_IMG|>"),
        "end": ("end_of_img_token", "<|END_OF_IMG|>"),
        "tile": ("tile_token", "TILE"),
        "whole": ("tile_global_token", "TILE_GLOBAL"),
    },
    written=("image_token", "<image>"),
    image=("img_patch_token", "<|IMG_PATCH|>"),
)
_COHERE2 = PictureLayout(
    Tiles(start="{start}", tile="{tokens}{line}", whole="{tokens}{line}", alone="{tokens}{line}", end="{end}"),
    {
        "start": ("boi_token", "<|START_OF_IMG|>"),
        "end": ("eoi_token", "<|END_OF_IMG|>"),
        "line": ("img_line_break_token", "<|IMG_LINE_BREAK|>"),
    },
)
_LLAMA4 = PictureLayout(
    Tiles(
        start="<|image_start|>",
        tile="{tokens}",
        between_columns="<|tile_x_separator|>",
        after_row="<|tile_y_separator|>",
        whole="<|image|>{tokens}",
        alone="<|image|>{tokens}",
        end="<|image_end|>",
    ),
    written=("fake_image_token", "<|image|>"),
    image=("patch_token", "<|patch|>"),
)
_OVIS2 = PictureLayout(
    Tiles(
        start="<IMG_START>",
        whole="{tokens}<IMG_GRID>",
        alone="{tokens}<IMG_GRID>",
        tile="{tokens}",
        between_columns="<IMG_COL>",
        between_rows="<IMG_ROW>",
        end="<IMG_END>",
        whole_first=True,
    ),
    written=("image_token", "<image>"),
    image=("image_atom_token", "<IMG_ATOM>"),
)
_MINICPM = PictureLayout(
    Tiles(
        whole="{start}{tokens}{end}",
        alone="{start}{tokens}{end}",
        tile="{slice}{tokens}{slice_end}",
        between_rows="\n",
        whole_first=True,
    ),
    {
        "start": ("image_start_token", "<image>"),
        "end": ("image_end_token", "</image>"),
        "slice": ("slice_start_token", "<slice>"),
        "slice_end": ("slice_end_token", "</slice>"),
    },
)
_PIXTRAL = PictureLayout(
    Rows("{break}", "{end}"),
    {"break": ("image_break_token", "[IMG_BREAK]"), "end": ("image_end_token", "[IMG_END]")},
)
_START_AND_END = {"start": ("image_start_token", ""), "end": ("image_end_token", "")}

# By `processor_class`. The first group is flat without markers of its own: what stands around the tokens is in the template.
LAYOUTS: Mapping[str, PictureLayout] = {
    **dict.fromkeys(
        (
            "LlavaProcessor",
            "LlavaNextProcessor",
            "LlavaOnevisionProcessor",
            "Qwen2VLProcessor",
            "Qwen2_5_VLProcessor",
            "Qwen3VLProcessor",
            "Qwen2_5OmniProcessor",
            "Qwen3OmniMoeProcessor",
            "Glm4vProcessor",
            "Glm46VProcessor",
            "Glm5NextProcessor",
            "PaddleOCRVLProcessor",
            "LightOnOcrProcessor",
            "VideoLlama3Processor",
            "DeepseekVLProcessor",
            "DeepseekVLHybridProcessor",
            "DeepseekOcr2Processor",
            "PerceptionLMProcessor",
            "Phi4MultimodalProcessor",
            "Exaone4_5_Processor",
            "Ernie4_5_VLMoeProcessor",
            "HyperCLOVAXVisionV2Processor",
            "Lfm3VlProcessor",
            "CohereCompassProcessor",
            "Cosmos3EdgeProcessor",
            "Dots3NoteProcessor",
            "Granite4VisionProcessor",
            "HunYuanVLProcessor",
            "Kimi_K25Processor",
            "AriaProcessor",
        ),
        _PLAIN,
    ),
    "Gemma3Processor": _GEMMA3,
    "Gemma3nProcessor": PictureLayout(_GEMMA3.layout, _GEMMA3.markers),
    "Gemma4Processor": _GEMMA4,
    "Gemma4UnifiedProcessor": _GEMMA4,
    "InternVLProcessor": _INTERNVL,
    "QianfanOCRProcessor": PictureLayout(
        _MARKED, _INTERNVL.markers, ("image_placeholder_token", "<image>"), _INTERNVL.image
    ),
    "JanusProcessor": PictureLayout(
        _MARKED, {"start": ("boi_token", "<begin_of_image>"), "end": ("eoi_token", "<end_of_image>")}
    ),
    "ChameleonProcessor": PictureLayout(
        _MARKED, {"start": ("boi_token", "<racm3:break>"), "end": ("eoi_token", "<eoss>")}
    ),
    "NemotronH_Omni_Reasoning_V3Processor": PictureLayout(_MARKED, _START_AND_END),
    "MuseGlimmerProcessor": PictureLayout(
        _MARKED,
        {"start": ("image_start_token", "<|image_start|>"), "end": ("image_end_token", "<|image_end|>")},
        image=("image_token", "<|patch|>"),
    ),
    "Idefics2Processor": PictureLayout(
        Tiles(tile="{around}{tokens}", whole="", alone="{around}{tokens}", end="{around}"), _AROUND, merged="around"
    ),
    "Idefics3Processor": _IDEFICS3,
    "SmolVLMProcessor": _IDEFICS3,
    "GraniteDoclingProcessor": _GRANITE_DOCLING,
    "Lfm2VlProcessor": _LFM2,
    "AyaVisionProcessor": _AYA,
    "Cohere2VisionProcessor": _COHERE2,
    "Llama4Processor": _LLAMA4,
    "Ovis2Processor": _OVIS2,
    "MiniCPMV4_6Processor": _MINICPM,
    "PixtralProcessor": _PIXTRAL,
    "PaliGemmaProcessor": PictureLayout(before_text=True),
}


@dataclass(frozen=True)
class Placeholder:
    """Text and tokens for a picture in the prompts of one model folder.

    Attributes:
        written: in the text of the chat template, once for each picture.
        image: the image token.
        layout: row of `LAYOUTS`.
        markers: the texts of its markers.
    """

    written: str
    image: str
    layout: PictureLayout = _PLAIN
    markers: Mapping[str, str] = field(default_factory=dict)

    @property
    def by_place(self) -> bool:
        """Whether the text depends on rows and columns of image tokens, not on their number alone."""
        return isinstance(self.layout.layout, Rows)

    def text_of(self, picture: PictureTokens) -> str:
        """The text for one picture.

        Raises:
            GuardError: its tokens do not fill its tiles or rows.
        """
        return self.layout.layout.write(picture, self.image, self.markers)

    def filled(self, text: str, pictures: list[PictureTokens]) -> str:
        """A rendered conversation with each placeholder, in order, replaced by its picture's text."""
        pieces = text.split(self.written)
        assert len(pieces) == len(pictures) + 1, "the template's placeholders were counted"
        texts = [self.text_of(picture) for picture in pictures]
        filled = pieces[0] + "".join(shown + piece for shown, piece in zip(texts, pieces[1:], strict=True))
        if not self.layout.merged:
            return filled
        marker = self.markers[self.layout.merged]
        return re.sub(rf"{re.escape(marker)}(?=[^\s<])", f"{marker} ", filled.replace(marker * 2, marker))

    def every_marker(self) -> str:
        """A text with every marker that a picture of up to 12 x 12 tiles can have."""
        layout = self.layout.layout
        text = self.text_of(PictureTokens(1))
        if isinstance(layout, Tiles):
            return text + self.text_of(PictureTokens(12 * 12 + bool(layout.whole), (12, 12)))
        return text + self.text_of(PictureTokens(4, (2, 2))) if isinstance(layout, Rows) else text
