"""Runs pictures through the vision encoder and returns the features of each.

A picture is prepared as the folder's image processor declares, and runs through the encoder by itself. The arrays are fed to
the graph's inputs by name; the rows of the output are the picture's image tokens (`placing` has the exceptions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError, ModelUnreadable
from ...graphs.json_files import read_json
from ..chat.folder_configs import FolderConfigs
from ..chat.picture_layouts import PictureTokens, token_grid
from ..chat.picture_markers import LAYOUTS
from ..runner_protocol import Port, Runner
from .deepstack import is_features
from .images import PROCESSORS, ImagePreprocessor
from .images_anyres import ANYRES_PROCESSORS, AnyresImagePreprocessor
from .images_gemma4 import GEMMA4_PROCESSOR, Gemma4ImagePreprocessor
from .images_idefics3 import IDEFICS3_PROCESSORS, Idefics3ImagePreprocessor
from .images_lfm2 import LFM2_PROCESSOR, Lfm2ImagePreprocessor
from .images_pixtral import PIXTRAL_PROCESSOR, PixtralImagePreprocessor
from .images_qwen import QWEN_PROCESSORS, QwenImagePreprocessor
from .images_tiled import TILED_PROCESSORS, TiledImagePreprocessor
from .pixel_steps import declared_processor, processor_name
from .placing import PLACES, in_order
from .prepared_picture import PreparedPicture, Preprocessor
from .transformers_pictures import TransformersPreprocessor

# Image processors in numpy, by transformers' name. All others are transformers' own, where that is installed.
OWN: Mapping[str, Callable[[Path], Preprocessor]] = {
    **dict.fromkeys(PROCESSORS, ImagePreprocessor.open),
    **dict.fromkeys(QWEN_PROCESSORS, QwenImagePreprocessor.open),
    **dict.fromkeys(IDEFICS3_PROCESSORS, Idefics3ImagePreprocessor.open),
    **dict.fromkeys(TILED_PROCESSORS, TiledImagePreprocessor.open),
    **dict.fromkeys(ANYRES_PROCESSORS, AnyresImagePreprocessor.open),
    LFM2_PROCESSOR: Lfm2ImagePreprocessor.open,
    GEMMA4_PROCESSOR: Gemma4ImagePreprocessor.open,
    PIXTRAL_PROCESSOR: PixtralImagePreprocessor.open,
}


@dataclass(frozen=True)
class Seen:
    """Output of the vision encoder for some pictures.

    Attributes:
        features: `[image tokens, d]`, pictures concatenated.
        pictures: the image tokens of each picture.
        outputs: rows added between the decoder's layers (`deepstack`), pictures concatenated, by the encoder's names.
        grids: patches over time, height and width of each picture, `[images, 3]` int64; `None` where sizes are fixed.
        merge: patches per side that become one token.
    """

    features: np.ndarray
    pictures: tuple[PictureTokens, ...]
    outputs: Mapping[str, np.ndarray]
    grids: np.ndarray | None = None
    merge: int = 1


def open_preprocessor(folder: Path) -> Preprocessor:
    """The image processor that a folder declares.

    Raises:
        ModelUnreadable: it declares none, one that cannot be run here, or options that cannot be followed.
    """
    kind = processor_name(declared_processor(folder))
    return OWN.get(kind, TransformersPreprocessor.open)(folder)


def unknown_processor(folder: Path) -> str | None:
    """The folder's processor, if it prepares images in a way that cannot be followed here; else `None`."""
    kind = FolderConfigs.read(folder).processor_class
    if kind not in (None, *LAYOUTS):
        return kind
    nested = read_json(folder / "processor_config.json").get("image_processor")
    declared = nested if isinstance(nested, dict) else read_json(folder / "preprocessor_config.json")
    name = processor_name(declared)
    if "image_processor_type" not in declared or name in OWN:
        return None
    try:
        open_preprocessor(folder)
    except ModelUnreadable:
        return name
    return None


def look(
    encoder: Runner, preprocessor: Preprocessor, pictures: Sequence[tuple[Image.Image, bool]], model_type: str | None
) -> Seen:
    """Run the vision encoder, once for each picture.

    Args:
        encoder: the graph.
        preprocessor: the folder's image processor.
        pictures: each RGB, with whether it is the only one of its prompt. A repeated picture is encoded once.
        model_type: of config.json, for the rules of `placing`.

    Raises:
        GuardError: a picture cannot be prepared, or encoder and image processor do not belong together.
    """
    place = PLACES.get(model_type or "", in_order)
    known: dict[tuple[int, bool], _One] = {}
    for image, alone in pictures:
        if (id(image), alone) not in known:
            prepared = preprocessor.prepare(image, alone)
            outputs = _encode(encoder, prepared)
            known[id(image), alone] = _One.of(prepared, place(prepared, outputs), outputs)
    ones = [known[id(image), alone] for image, alone in pictures]
    grids = [picture.grid for picture in ones if picture.grid is not None]
    deep = list(ones[0].deep)
    return Seen(
        features=np.concatenate([picture.rows for picture in ones]),
        pictures=tuple(picture.tokens for picture in ones),
        outputs={name: np.concatenate([picture.deep[name] for picture in ones]) for name in deep},
        grids=np.concatenate(grids) if grids else None,
        merge=ones[0].merge,
    )


def _encode(encoder: Runner, prepared: PreparedPicture) -> dict[str, np.ndarray]:
    """Outputs of the vision encoder for one picture; a graph that takes one part at a time is run for each part."""
    feeds = fed(encoder.inputs, prepared.arrays)
    parts = {len(array) for array in feeds.values()}
    takes_one = all(port.shape[0] == 1 for port in encoder.inputs.values())
    if not (prepared.apart and takes_one and len(parts) == 1):
        return encoder.run(feeds)
    calls = [encoder.run({name: array[[part]] for name, array in feeds.items()}) for part in range(parts.pop())]
    return {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}


@dataclass(frozen=True, eq=False)
class _One:
    """The vision encoder's output for one picture; attributes as those of `Seen`."""

    rows: np.ndarray
    tokens: PictureTokens
    deep: Mapping[str, np.ndarray]
    grid: np.ndarray | None
    merge: int

    @classmethod
    def of(cls, prepared: PreparedPicture, rows: np.ndarray, outputs: Mapping[str, np.ndarray]) -> _One:
        count = len(rows)
        if not count or prepared.tokens not in (None, count):
            raise GuardError(
                f"the vision encoder gives {count} features for {prepared.tokens or 'the'} image tokens; "
                "the image processor's config is not this model's, copy the one that belongs to it"
            )
        patches = prepared.arrays.get("image_grid_thw")
        return cls(
            rows=rows,
            tokens=picture_tokens(prepared, count),
            deep={name: values for name, values in outputs.items() if is_features(name)},
            grid=patches,
            merge=1 if patches is None else math.isqrt(int(patches.prod()) // count),
        )


def picture_tokens(prepared: PreparedPicture, count: int) -> PictureTokens:
    """The image tokens of a prepared picture for which the vision encoder gives `count` rows."""
    grid = prepared.grid
    if grid is None and prepared.seen_size is not None:
        grid = token_grid(prepared.seen_size, count)
    return PictureTokens(count, grid, prepared.sizes if grid is not None else ())


def fed(inputs: Mapping[str, Port], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of one picture that a graph takes, in its dtypes.

    A graph may leave out leading axes of length 1 that transformers' image processors give: one prompt, one picture.

    Raises:
        GuardError: the graph takes something else.
    """
    left_out = [name for name in arrays if name.startswith("pixel_values") and name not in inputs]
    if left_out and inputs.keys() & arrays.keys():
        raise GuardError(
            f"the image processor also gives {', '.join(left_out)} for this picture, which the vision encoder does not take; "
            "send a smaller picture"
        )
    feeds = {}
    for name, port in inputs.items():
        array = arrays.get(name)
        if array is None:
            raise GuardError(
                f"the vision encoder takes {', '.join(inputs)}, the folder's image processor gives {', '.join(arrays)}; "
                "copy the image processor's config that belongs to this model"
            )
        extra = array.ndim - len(port.shape)
        if extra < 0 or any(size != 1 for size in array.shape[:extra]):
            raise GuardError(
                f"the vision encoder takes {name} of {len(port.shape)} axes, the folder's image processor gives "
                f"{list(array.shape)}; copy the image processor's config that belongs to this model"
            )
        feeds[name] = array.reshape(array.shape[extra:]).astype(port.dtype)
    return feeds
