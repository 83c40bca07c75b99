"""What onnxruntime-genai answers: greedy tokens of a folder for a prompt, with its own image processor and tokenizer."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmguard.runtime.chat.chat import ChatTokenizer
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.vlm import VisionLanguageModel


class Genai:
    """One folder of a picture pipeline, open."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self.og: Any = onnxruntime_genai
        self.folder = folder
        self.model: Any = self.og.Model(str(folder))
        self.processor = self.model.create_multimodal_processor()

    def inputs(self, prompt: str, image: Image.Image | Sequence[Image.Image] | None) -> Any:
        """The named tensors that genai makes of a chat prompt as text, and a picture or several."""
        pictures = [image] if isinstance(image, Image.Image) else list(image or ())
        return self.processor(prompt, images=self.images(*pictures)) if pictures else self.processor(prompt)

    def images(self, *pictures: Image.Image) -> Any:
        """Pictures as genai opens them."""
        files = [io.BytesIO() for _ in pictures]
        for picture, file in zip(pictures, files, strict=True):
            picture.save(file, "PNG")
        return self.og.Images.open_bytes(*(file.getvalue() for file in files))

    def tokens(self, prompt: str, image: Image.Image | Sequence[Image.Image] | None, count: int) -> list[int]:
        """The first tokens of the answer, fewer if it ends."""
        inputs = self.inputs(prompt, image)
        length = inputs["input_ids"].shape()[1]
        params = self.og.GeneratorParams(self.model)
        # the folder's own max_length: a windowed cache must have room for the window
        params.set_search_options(do_sample=False)
        generator = self.og.Generator(self.model, params)
        generator.set_inputs(inputs)
        for _ in range(count):
            if generator.is_done():
                break
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)][length:]


def on_cpu(folder: Path, scratch: Path) -> Path:
    """A copy for the CPU provider; the builder's folders in half precision ask for CUDA."""
    copy = Path(shutil.copytree(folder, scratch / f"{folder.name} on CPU"))
    path = copy / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    path.write_text(json.dumps(config))
    return copy


def prompt_text(folder: Path, prompt: str, marker: str | None) -> str:
    """The chat prompt as an app writes it for genai.

    Args:
        folder: with its tokenizer.
        prompt: the question.
        marker: text that stands for the picture; `None` for a prompt without one.
    """
    chat = ChatTokenizer.open(folder)
    text = chat.tokenizer.decode(chat.encode(prompt), skip_special_tokens=False)
    return text if marker is None else text.replace(prompt, f"{marker}{prompt}")


def pixels(inputs: Any) -> np.ndarray:
    return inputs["pixel_values"].as_numpy()


def picture(size: tuple[int, int]) -> Image.Image:
    """Noise of a width and height, the same at each call."""
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), np.uint8))


def tokens_here(vlm: VisionLanguageModel, request: Request, sampling: Sampling) -> list[int]:
    """The tokens of the answer in the runtime here, to compare with `Genai.tokens`."""
    return [step.tokens[0] for step in vlm.steps([request], sampling) if step.tokens[0] is not None]
