"""Facts about pictures: the steps of the model's image processor, and the text around a picture's tokens.

The page has the arithmetic of two kinds of processors: `whole` (the picture in one size, LLaVA's) and `tiles` (Idefics3's and
SmolVLM's). Models of other kinds are rejected.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...graphs.errors import GuardError
from ...graphs.graph_io import load_graph
from ...graphs.package import ModelPackage
from ...runtime.chat.folder_configs import FolderConfigs
from ...runtime.chat.picture_layouts import Flat, PictureTokens, Tiles
from ...runtime.chat.picture_markers import Placeholder
from ...runtime.images.images import PROCESSORS, ImagePreprocessor
from ...runtime.images.images_idefics3 import IDEFICS3_PROCESSORS, Idefics3ImagePreprocessor
from ...runtime.images.pixel_steps import PixelSteps, declared_processor, processor_name
from ...runtime.images.prepared_picture import Preprocessor

_LLAVA = "LlavaProcessor"
_IDEFICS3 = ("GraniteDoclingProcessor", "Idefics3Processor", "SmolVLMProcessor")
# Processor class -> the image processors whose arithmetic the page has.
_PREPARED: Mapping[str, Collection[str]] = {_LLAVA: PROCESSORS, **dict.fromkeys(_IDEFICS3, IDEFICS3_PROCESSORS)}
_FAMILIES = (
    f"LLaVA-like ones ({_LLAVA} with {', '.join(sorted(PROCESSORS))}) and Idefics3-like ones "
    f"({', '.join(_IDEFICS3)} with {', '.join(sorted(IDEFICS3_PROCESSORS))}) alone"
)


def require_page_pictures(package: ModelPackage, vision_encoder: Path) -> None:
    """The page prepares pictures for this model as `GuardedVLM` does.

    Raises:
        GuardError: it does not.
    """
    root = package.root
    kind = FolderConfigs.read(root).processor_class or _LLAVA
    name = processor_name(declared_processor(root))
    if name not in _PREPARED.get(kind, ()):
        unknown = name if kind in _PREPARED else kind
        raise GuardError(f"{root}: its pictures are prepared by {unknown}, the page prepares those of {_FAMILIES}")
    given = ["pixel_values"] + ["pixel_attention_mask"] * (name in IDEFICS3_PROCESSORS)
    inputs = [value.name or "" for value in load_graph(vision_encoder, trust_links=True).graph.inputs]
    if "pixel_values" not in inputs or not set(inputs) <= set(given):
        raise GuardError(
            f"{vision_encoder}: takes {', '.join(inputs)}, the page gives {' and '.join(given)} alone; export the model again"
        )


def image_facts(images: Preprocessor) -> dict[str, Any]:
    """The steps of an image processor that `require_page_pictures` accepts."""
    if isinstance(images, Idefics3ImagePreprocessor):
        return {
            "kind": "tiles",
            "longestEdge": images.longest_edge,
            "tile": images.tile,
            "splits": images.splits,
            **_step_facts(images.steps),
        }
    assert isinstance(images, ImagePreprocessor), images.kind
    return {
        "kind": "whole",
        "padToSquare": images.pad_to_square,
        "shortestEdge": images.shortest_edge,
        "resizeTo": images.resize_to,
        "cropTo": images.crop_to,
        **_step_facts(images.steps),
    }


def _step_facts(steps: PixelSteps) -> dict[str, Any]:
    return {
        "resample": steps.resample.name.lower(),
        "rescaleFactor": steps.rescale_factor,
        "mean": steps.mean,
        "std": steps.std,
    }


def layout_facts(placeholder: Placeholder) -> dict[str, Any]:
    """The text around a picture's tokens, for layouts whose tiles all have as many of them."""
    layout = placeholder.layout.layout
    assert isinstance(layout, Tiles | Flat), layout
    tiles = layout if isinstance(layout, Tiles) else Tiles(tile="", whole="", alone=layout.text)
    return {
        "markers": dict(placeholder.markers),
        "start": tiles.start,
        "end": tiles.end,
        "alone": tiles.alone,
        "aloneAsTile": tiles.alone_as_tile,
        "tile": tiles.tile,
        "betweenColumns": tiles.between_columns,
        "afterRow": tiles.after_row,
        "betweenRows": tiles.between_rows,
        "whole": tiles.whole,
        "wholeFirst": tiles.whole_first,
    }


def sample_cuts(placeholder: Placeholder) -> list[PictureTokens]:
    """Pictures whose text differs: one that is not cut and, where the layout has tiles, one of 2 x 3 tiles."""
    layout = placeholder.layout.layout
    if not isinstance(layout, Tiles):
        return [PictureTokens(2)]
    return [PictureTokens(2), PictureTokens(2 * (2 * 3 + bool(layout.whole)), (2, 3))]
