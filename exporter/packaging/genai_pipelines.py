"""The picture pipelines of onnxruntime-genai: one row for each kind, and why the others cannot be written.

genai decides by `model.type` how a picture is fed and where its tokens stand in the prompt, so only the types below can be
written. Its own builder and processors know others too; a new type is a new row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...graphs.errors import GuardError, first_line
from ...runtime.chat.folder_configs import IMAGE_TOKEN_KEYS

RUNTIME = "onnxruntime-genai"


@dataclass(frozen=True)
class PicturePipeline:
    """One kind of picture pipeline.

    Attributes:
        genai_type: genai's name of it, `model.type`.
        vision_inputs: genai's name of each input that it feeds the vision encoder -> the graph's.
        tokens: ids of `model`, each with the keys that it may have in `config.json` or its `vision_config`.
        numbers: numbers of `model.vision`, from `config.json`; raises GuardError for a model that genai cannot run.
        fixed: ids that genai has in its code, whatever its config has.
        silent: whether the config has to say that there is no graph for sound, which genai opens otherwise.
        deep: whether image features go in between the decoder's layers too (`graphs/genai_deepstack.py`).
        marks: whether a decoder may take token types, which are 1 for a picture's tokens (`graphs/genai_token_types.py`).
        states: genai's kind of each state beside the KV cache -> how the names of its inputs and outputs begin.
        of_vision: more numbers of `model.vision`, from the graph of the vision encoder.
        of_decoder: more entries of `model.decoder`, from its number of layers and its graph; raises GuardError for a graph that
            genai cannot feed.
    """

    genai_type: str
    vision_inputs: Mapping[str, str]
    tokens: Mapping[str, tuple[str, ...]]
    numbers: Callable[[Mapping[str, Any]], dict[str, Any]]
    fixed: Mapping[str, int] = field(default_factory=dict)
    silent: bool = False
    deep: bool = False
    marks: bool = False
    states: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    of_vision: Callable[[ir.Graph], dict[str, Any]] = lambda vision: {}
    of_decoder: Callable[[int, ir.Graph], dict[str, Any]] = lambda layers, decoder: {}

    def require(self, config: Mapping[str, Any], where: str | Path) -> tuple[dict[str, int], dict[str, Any]]:
        """The ids and numbers of a model, from its `config.json`.

        Args:
            config: its content.
            where: the model, for errors.

        Raises:
            GuardError: one is missing, or genai cannot run a model with this one.
        """
        try:
            parts = (config, config.get("vision_config") or {})
            ids = {
                new: next(part[key] for part in parts for key in keys if key in part)
                for new, keys in self.tokens.items()
            }
            if wrong := [name for name, number in ids.items() if type(number) is not int]:
                raise TypeError(f"{wrong[0]} is no number")
            self._require_fixed(ids)
            return ids, self.numbers(config)
        except GuardError as error:
            raise GuardError(f"{where}: {error}") from None
        except (KeyError, StopIteration, TypeError, ValueError) as error:
            raise GuardError(
                f"{where}: its config.json lacks an id or a number that {RUNTIME} needs ({first_line(error)}); copy the "
                "model's again"
            ) from None

    def _require_fixed(self, ids: Mapping[str, int]) -> None:
        for name, number in self.fixed.items():
            if ids[name] != number:
                raise GuardError(
                    f"{name} is {ids[name]}, and {RUNTIME} writes {number} for every model of this type; keep the layout that "
                    "it has"
                )


def _qwen_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    return {
        "patch_size": vision["patch_size"],
        "spatial_merge_size": vision["spatial_merge_size"],
        "tokens_per_second": float(vision.get("tokens_per_second", 2)),  # of videos
    }


def _gemma3_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["mm_tokens_per_image"] != _GEMMA3_TOKENS:
        raise GuardError(
            f"mm_tokens_per_image is {config['mm_tokens_per_image']}, and {RUNTIME} writes {_GEMMA3_TOKENS} image tokens for "
            "every picture; keep the layout that it has"
        )
    return {}


def _phi4_numbers(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config["vision_config"]
    tile = (vision["crop_size"], vision["patch_size"])
    if tile != _PHI4_TILE:
        raise GuardError(
            f"its tiles have {tile[0]} pixels and patches of {tile[1]}, and {RUNTIME} counts the tokens of tiles of "
            f"{_PHI4_TILE[0]} and {_PHI4_TILE[1]}; keep the layout that it has"
        )
    return {}


def _sizes(config: Mapping[str, Any], merge: str) -> dict[str, Any]:
    """Of patches in pixels, and of tokens in patches, which is `merge` in `config.json`."""
    return {"patch_size": config["vision_config"]["patch_size"], "spatial_merge_size": config[merge]}


def _lfm2_patches(vision: ir.Graph) -> dict[str, Any]:
    """The length of a picture's list of patches, where the graph takes one length alone."""
    shape = next((value.shape for value in vision.inputs if value.name == "pixel_values"), None)
    return {"max_num_patches": shape[1]} if shape is not None and isinstance(shape[1], int) else {}


def _lfm2_layers(layers: int, decoder: ir.Graph) -> dict[str, Any]:
    """Which layers have a convolution, and how many tokens its state holds."""
    past = f"{_CONV_STATE[0]}."
    windows = {str(value.name): value.shape for value in decoder.inputs if str(value.name).startswith(past)}
    sizes = {None if shape is None else shape[-1] for shape in windows.values()}
    if len(sizes) != 1 or not isinstance(size := sizes.pop(), int):
        raise GuardError(
            f"its convolutions have no state of one size, as {RUNTIME} feeds it; keep the layout that it has"
        )
    kinds = ["conv" if f"{past}{layer}" in windows else "full_attention" for layer in range(layers)]
    return {"layer_types": kinds, "conv_cache_size": size}


def _fixed_states(layers: int, decoder: ir.Graph) -> dict[str, Any]:
    """Nothing more, if the states of linear attention have one fixed size per kind: genai makes all as large as the first."""
    for past, _ in _LINEAR_STATES.values():
        states = [value.shape for value in decoder.inputs if str(value.name).startswith(f"{past}.")]
        sizes = {None if shape is None else tuple(shape[1:]) for shape in states}
        if len(sizes) != 1 or not all(isinstance(size, int) for size in sizes.pop() or (None,)):
            raise GuardError(
                f"its linear layers have no states of one size ({past}), as {RUNTIME} feeds them; keep the layout that it has"
            )
    return {}


_CONV_STATE = ("past_conv", "present_conv")
_LINEAR_STATES = {"conv": _CONV_STATE, "recurrent": ("past_recurrent", "present_recurrent")}
_GEMMA3_TOKENS = 256
_PHI4_TILE = (448, 14)
_IMAGE_TOKEN = {"image_token_id": IMAGE_TOKEN_KEYS}
_QWEN = PicturePipeline(
    genai_type="qwen2_5_vl",
    vision_inputs={name: name for name in ("pixel_values", "image_grid_thw")},
    tokens={name: (name,) for name in ("image_token_id", "video_token_id", "vision_start_token_id")},
    numbers=_qwen_numbers,
)
_QWEN3 = replace(_QWEN, genai_type="qwen3_vl", deep=True)
# Its layers with linear attention have no KV cache, but two states each.
_QWEN3_5 = replace(_QWEN, genai_type="qwen3_5", states=_LINEAR_STATES, of_decoder=_fixed_states)
_GEMMA3 = PicturePipeline(
    genai_type="gemma3",
    vision_inputs={"pixel_values": "pixel_values"},
    tokens=_IMAGE_TOKEN,
    numbers=_gemma3_numbers,
    marks=True,
)
_PHI4 = PicturePipeline(
    genai_type="phi4mm",
    vision_inputs={
        "pixel_values": "image_pixel_values",
        "attention_mask": "image_attention_mask",
        "image_sizes": "image_sizes",
    },
    tokens=_IMAGE_TOKEN,
    numbers=_phi4_numbers,
    fixed={"image_token_id": 200_010},
    silent=True,
)
_LFM2 = PicturePipeline(
    genai_type="lfm2_vl",
    vision_inputs={
        "pixel_values": "pixel_values",
        "attention_mask": "pixel_attention_mask",
        "image_sizes": "spatial_shapes",
    },
    tokens=_IMAGE_TOKEN,
    numbers=partial(_sizes, merge="downsample_factor"),
    states={"conv": _CONV_STATE},
    of_vision=_lfm2_patches,
    of_decoder=_lfm2_layers,
)
_MISTRAL3 = PicturePipeline(
    genai_type="mistral3",
    vision_inputs={"pixel_values": "pixel_values"},
    tokens=_IMAGE_TOKEN,
    numbers=partial(_sizes, merge="spatial_merge_size"),
)
# By `model_type` of config.json. Qwen2-VL differs from Qwen2.5-VL inside its vision encoder alone.
PIPELINES: Mapping[str, PicturePipeline] = {
    "gemma3": _GEMMA3,
    "lfm2_vl": _LFM2,
    "mistral3": _MISTRAL3,
    "phi4_multimodal": _PHI4,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": replace(_QWEN3_5, genai_type="qwen3_5_moe"),
}

_REMOTE = "transformers has it as code of the checkpoint only, which is not run"
_GEMMA4 = f"{RUNTIME} puts blank lines around a picture's tokens, which the model was not trained with"
# Types that genai runs with pictures, by their `model_type`, and why they are not written.
UNWRITTEN: Mapping[str, str] = {
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "phi3_v": _REMOTE,
    "videochat_flash_qwen": _REMOTE,
}


def pipeline_of(config: Mapping[str, Any], where: str | Path) -> PicturePipeline:
    """The pipeline of a model's type.

    Args:
        config: the content of its `config.json`.
        where: the folder, for the error.

    Raises:
        GuardError: genai has none for it, or none that can be written.
    """
    model_type = str(config.get("model_type"))
    if model_type in UNWRITTEN:
        raise GuardError(
            f"{where}: is of type {model_type}, which {RUNTIME} runs with pictures, but {UNWRITTEN[model_type]}; keep the "
            "layout that it has"
        )
    if model_type not in PIPELINES:
        raise GuardError(
            f"{where}: is of type {model_type}, with which {RUNTIME} cannot be given pictures here, only "
            f"{', '.join(sorted(PIPELINES))}; keep the layout that it has"
        )
    return PIPELINES[model_type]
