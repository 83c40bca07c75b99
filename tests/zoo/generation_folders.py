"""Whole folders that transformers' `export_for_generation` writes: several graphs, TWO of them with decoder weights.

    export.json           which graphs there are, and how each was traced
    language_model.onnx   the decoder for a prompt: inputs_embeds -> last_hidden_state and a cache
    lm_head.onnx          last_hidden_state -> logits
    decode.onnx           the decoder again, with embeddings and head, for one token on a filled cache

The image towers of these families are left out: `generate()` runs them before the parts that are captured.

`FOLDERS` is the table. Feeds are what `generate()` itself hands to each part of the torch model, so that masks, positions
and caches are the ones that a caller of the folder must give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from zoo import families
from zoo.exporting import export_once, quiet, release
from zoo.families import IMAGE_ID, LAYERS, VISION, WIDTH
from zoo.model import FIRST_PLAIN_ID, Feeds

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

PROMPT, DECODE, HEAD = "language_model", "decode", "lm_head"
IMAGE_TOKENS = 4
Pictures = Callable[["PreTrainedModel", np.random.Generator, "Tensor"], Mapping[str, "Tensor"]]


@dataclass(frozen=True, eq=False)
class GenerationFolder:
    """One folder as written, and the torch model it was written from."""

    name: str
    folder: Path
    layers: int
    width: int
    family: str
    exporter: str
    torch_model: PreTrainedModel
    torch_decoder: nn.Module
    """The module whose `.layers` can be hooked."""
    pictures: Pictures

    def path(self, part: str) -> Path:
        return self.folder / f"{part}.onnx"

    def calls(self, batch: int, sequence: int, pad: int = 0) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
        """What `generate()` calls for a prompt with a picture and one token after it: part -> (module, its inputs).

        Row `i` has `pad - i` padding tokens on the left (never fewer than none).
        """
        from transformers.exporters.utils import decompose_for_generation

        with quiet():
            return decompose_for_generation(self.torch_model, self.prompt(batch, sequence, pad))

    def prompt(self, batch: int, sequence: int, pad: int = 0) -> dict[str, Any]:
        """Inputs of `generate()`."""
        import torch

        if sequence < pad + IMAGE_TOKENS + 2:
            raise ValueError(f"a prompt of {sequence} tokens does not hold {pad} of padding and a picture's")
        random = np.random.default_rng(batch * 10_000 + sequence * 100 + pad)
        ids = random.integers(FIRST_PLAIN_ID, families.VIDEO_ID, (batch, sequence))
        padding = np.arange(sequence)[None, :] < (pad - np.arange(batch))[:, None]
        ids[padding] = 0
        ids[:, pad + 1 : pad + 1 + IMAGE_TOKENS] = IMAGE_ID
        text = torch.from_numpy(ids)
        mask = torch.from_numpy((~padding).astype(np.int64))
        return {"input_ids": text, "attention_mask": mask, **self.pictures(self.torch_model, random, text)}

    def feeds(self, part: str, inputs: Mapping[str, Any]) -> Feeds:
        """A part's inputs as its graph takes them; inputs that the exporter found unused are not there."""
        from transformers.exporters.utils import onnx_inputs

        names = [value.name for value in onnx.load(self.path(part), load_external_data=False).graph.input]
        return {name: tensor.numpy() for name, tensor in onnx_inputs(names, inputs).items()}

    def run_torch(self, call: tuple[nn.Module, Mapping[str, Any]]) -> Any:
        """Torch's answer to one of `calls`; the inputs are kept as they are (a cache grows when it is used)."""
        import torch

        module, inputs = call
        with torch.no_grad():
            return module(**copy.deepcopy(dict(inputs)))


def make(
    model_type: str,
    folder: Path,
    build: Callable[[], PreTrainedModel],
    pictures: Pictures,
    decoder: Callable[[Any], Any] = families.decoder_of,
) -> GenerationFolder:
    """A family's folder, exported by `OnnxExporter().export_for_generation(...)`."""
    model = build()
    made = GenerationFolder(
        name=f"{model_type.replace('_', '-')}-generation",
        folder=folder,
        layers=LAYERS,
        width=WIDTH,
        family=model_type,
        exporter=release("transformers"),
        torch_model=model,
        torch_decoder=decoder(model),
        pictures=pictures,
    )

    def export(target: Path) -> None:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        # Two rows, one of them padded: one unpadded row would be baked into the graphs.
        sample = made.prompt(batch=2, sequence=9, pad=1)
        OnnxExporter().export_for_generation(model, sample, OnnxConfig(dynamic=True)).save_pretrained(target)

    export_once(folder, export)
    return made


def _tiny_llava() -> PreTrainedModel:
    from zoo.truth import tiny_llava

    return tiny_llava("float32")


def _tiny(model_type: str) -> PreTrainedModel:
    return families.tiny(families.FAMILIES[model_type])


def _squares(model: PreTrainedModel, random: np.random.Generator, text: Tensor) -> dict[str, Tensor]:
    """One square picture per row."""
    import torch

    size = VISION["image_size"]
    pixels = random.standard_normal((len(text), 3, size, size), dtype=np.float32)
    return {"pixel_values": torch.from_numpy(pixels)}


def _squares_and_types(model: PreTrainedModel, random: np.random.Generator, text: Tensor) -> dict[str, Tensor]:
    """Gemma3 is also told which tokens are a picture's: they see each other in both directions."""
    return {**_squares(model, random, text), "token_type_ids": (text == IMAGE_ID).long()}


def _patches(model: PreTrainedModel, random: np.random.Generator, text: Tensor) -> dict[str, Tensor]:
    """Qwen's pictures as rows of patches: 4 x 4 of them, of which 2 x 2 make a token."""
    import torch

    tower = model.config.vision_config
    pixels = (len(text) * 16, 3 * tower.temporal_patch_size * tower.patch_size**2)
    return {
        "pixel_values": torch.from_numpy(random.standard_normal(pixels, dtype=np.float32)),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(text)),
        "mm_token_type_ids": (text == IMAGE_ID).long(),
    }


FOLDERS: dict[str, Callable[[Path], GenerationFolder]] = {
    "llava-generation": lambda folder: make("llava", folder, _tiny_llava, _squares),
    "gemma3-generation": lambda folder: make("gemma3", folder, partial(_tiny, "gemma3"), _squares_and_types),
    "qwen2-5-vl-generation": lambda folder: make("qwen2_5_vl", folder, partial(_tiny, "qwen2_5_vl"), _patches),
}
