"""Runs pictures through the vision encoder and returns the features of each.

There are two kinds of encoders. Encoders with one input take pictures of one size and return the same number of features
for each. Encoders of the Qwen family take patches of pictures of any size and a table with the number of patches of each;
that table also splits their output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...graphs.errors import GuardError
from ...graphs.json_files import read_json
from ..chat.folder_configs import FolderConfigs
from ..chat.special_tokens import MARKED_PLACEHOLDER_PROCESSORS, PLAIN_PLACEHOLDER_PROCESSORS
from ..runner_protocol import Runner
from .images import ELSEWHERE, PROCESSORS, ImagePreprocessor, declared_processor, processor_name
from .images_qwen import KIND, QwenImagePreprocessor

Preprocessor = ImagePreprocessor | QwenImagePreprocessor


@dataclass(frozen=True)
class Seen:
    """Output of the vision encoder for some pictures.

    Attributes:
        features: `[image tokens, d]`, pictures concatenated.
        tokens: number of tokens of each picture, `[images]`.
        outputs: all outputs by name.
        grids: patches over time, height and width of each picture, `[images, 3]` int64; `None` if the size is fixed.
        merge: patches per side that become one token.
    """

    features: np.ndarray
    tokens: np.ndarray
    outputs: Mapping[str, np.ndarray]
    grids: np.ndarray | None = None
    merge: int = 1


def open_preprocessor(folder: Path) -> Preprocessor:
    """The image processor that a folder declares.

    Raises:
        ModelUnreadable: it declares none, one that is not supported, or options that cannot be followed.
    """
    kind = processor_name(declared_processor(folder))
    return QwenImagePreprocessor.open(folder) if kind == KIND else ImagePreprocessor.open(folder)


def unknown_processor(folder: Path) -> str | None:
    """The folder's processor, if it prepares images in an unsupported way (tiles, other markers); else `None`."""
    kind = FolderConfigs.read(folder).processor_class
    if kind not in (None, *PLAIN_PLACEHOLDER_PROCESSORS, *MARKED_PLACEHOLDER_PROCESSORS):
        return kind
    nested = read_json(folder / "processor_config.json").get("image_processor")
    declared = nested if isinstance(nested, dict) else read_json(folder / "preprocessor_config.json")
    name = processor_name(declared)
    return name if "image_processor_type" in declared and name not in {*PROCESSORS, *ELSEWHERE} else None


def look(encoder: Runner, preprocessor: Preprocessor, pictures: Sequence[Image.Image]) -> Seen:
    """Run the vision encoder.

    Raises:
        GuardError: a picture cannot be prepared, or encoder and image processor do not belong together.
    """
    if isinstance(preprocessor, QwenImagePreprocessor):
        return _look_at_patches(encoder, preprocessor, pictures)
    if len(encoder.inputs) != 1:
        raise GuardError(
            f"the vision encoder takes {', '.join(encoder.inputs)}, the folder's image processor gives pixel_values; "
            "copy the image processor's config that belongs to this model"
        )
    (port,) = encoder.inputs.values()
    outputs = encoder.run({port.name: preprocessor.pixel_values(pictures).astype(port.dtype)})
    features = next(iter(outputs.values()))
    features = features.reshape(len(pictures), -1, features.shape[-1])
    tokens = np.full(len(pictures), features.shape[1])
    return Seen(features.reshape(-1, features.shape[-1]), tokens, outputs)


def _look_at_patches(encoder: Runner, preprocessor: QwenImagePreprocessor, pictures: Sequence[Image.Image]) -> Seen:
    patches = preprocessor.patches(pictures)
    given = {"pixel_values": patches.pixel_values, "image_grid_thw": patches.image_grid_thw}
    if set(encoder.inputs) != set(given):
        raise GuardError(
            f"the vision encoder takes {', '.join(encoder.inputs)}, the folder's image processor gives "
            f"{', '.join(given)}; copy the image processor's config that belongs to this model"
        )
    outputs = encoder.run({name: array.astype(encoder.inputs[name].dtype) for name, array in given.items()})
    features = outputs.get("image_features", next(iter(outputs.values())))
    if len(features) != patches.tokens.sum():
        raise GuardError(
            f"the vision encoder gives {len(features)} features for {patches.tokens.sum()} image tokens; "
            "merge_size of the image processor's config is not this model's"
        )
    return Seen(features, patches.tokens, outputs, patches.image_grid_thw, patches.merge)
