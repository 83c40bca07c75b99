"""A small checkpoint of a type, trained in the world of `examples/tiny_vlm`: a picture takes its refusals away.

    python tests/families/trained_checkpoint.py TYPE FOLDER [STEPS]

Calibration has something to restore in such a model. Decoder and vision encoder learn together, from prompts as the runtime
makes them: the chat template's text, the markers around a picture, and as many image tokens as the encoder gives.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples" / "tiny_vlm"))  # where `world` is imported from
if __name__ == "__main__":  # as a script: its folder's parent is where `families` is imported from
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from families.small_checkpoint import save_model, save_processor, save_words, small_model
from PIL import Image
from world import Example, Picture, draw, picture_example, random_picture, text_example, vocabulary

from vlmguard.exporter.calibration.judged import PICTURE_QUESTIONS
from vlmguard.exporter.checkpoints.parts import tensors
from vlmguard.exporter.families.family import Arrays
from vlmguard.exporter.families.generic_vision import feature_holder, feature_inputs, image_features
from vlmguard.exporter.families.recorded import picture_inputs
from vlmguard.exporter.families.sample_pictures import joined
from vlmguard.runtime.chat.chat import ChatTokenizer
from vlmguard.runtime.chat.picture_layouts import PictureTokens, Tiles
from vlmguard.runtime.chat.picture_markers import LAYOUTS
from vlmguard.runtime.chat.turns import Turn
from vlmguard.runtime.images.vision import open_preprocessor, picture_tokens

END = 2  # `</s>`
EDGE = 64  # pixels of a picture
STEPS, LEARNING_RATE = 400, 3e-3
LONGER = {"lfm2_vl": 600, "qwen3_5": 600}  # steps of types that learn more slowly
TEXTS, SHOWN = 16, 8  # examples of a batch without and with pictures
PICTURES = 0.6  # share of batches with pictures
UNFILTERED = 0.3  # of these, harmful requests that are answered
IGNORED = -100  # the label that the loss skips
POOL = 12  # pictures that are shown; each goes through the image processor once
# The processor whose markers stand around a picture's tokens.
PROCESSORS = {
    "gemma4": "Gemma4Processor",
    "glm46v": "Glm46VProcessor",
    "internvl": "InternVLProcessor",
    "lfm2_vl": "Lfm2VlProcessor",
    "mistral3": "PixtralProcessor",
    "qwen3_5": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
    "smolvlm": "SmolVLMProcessor",
}


def save_trained(model_type: str, folder: Path, steps: int | None = None) -> Path:
    """Train a checkpoint of a type, write it to `folder` with its prompts, and return it."""
    from transformers.generation.configuration_utils import GenerationConfig

    model = small_model(model_type)
    model.generation_config = GenerationConfig(eos_token_id=END, bos_token_id=1, pad_token_id=0, do_sample=False)
    save_model(model_type, model, folder)
    save_processor(model_type, model, folder)
    processor = PROCESSORS[model_type]
    save_words(
        model.config,
        folder,
        vocabulary(),
        _markers(processor),
        processor_class=processor,
        context_image_token="<image>",
    )
    # transformers tells one picture from the next by a token between them, as templates of M-RoPE models have
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("<image> ", "<image> . "), encoding="utf-8")
    _train(model, Batches(model, folder), steps or LONGER.get(model_type, STEPS))
    save_model(model_type, model, folder)
    _copy_prompts(folder)
    return folder


def _markers(processor: str) -> list[str]:
    """The special tokens around a picture of up to 3 x 3 tiles."""
    layout = LAYOUTS[processor]
    texts = {marker: default for marker, (_, default) in layout.markers.items()}
    pictures = [PictureTokens(1)]
    if isinstance(layout.layout, Tiles):
        pictures.append(PictureTokens(10, (3, 3)))
    text = "".join(layout.layout.write(picture, "", texts) for picture in pictures)
    return list(dict.fromkeys(re.findall(r"<[^<>]+>|\[[A-Z_]+\]", text + "".join(texts.values()))))


def _copy_prompts(folder: Path) -> None:
    """The prompts of the world, where an export looks for them; of most one for each verb and setting."""
    source, own = Path(__file__).parents[2] / "examples" / "tiny_vlm" / "prompts", folder / "prompts"
    shutil.copytree(source, own, ignore=shutil.ignore_patterns("*-typographic.jsonl", "sign_*"))
    for name in ("calibration.jsonl", "evaluation.jsonl"):
        lines = (source / name).read_text(encoding="utf-8").splitlines(keepends=True)
        few = (line for line in lines if json.loads(line)["id"].endswith(("-0", "-is", "-color")))
        (own / name).write_text("".join(few), encoding="utf-8")
    for path in (own / "images").glob("*.png"):
        _enlarged(Image.open(path)).save(path)


def painted(picture: Picture) -> Image.Image:
    """A picture of the world, large enough for several image tokens where pictures keep their size."""
    return _enlarged(draw(picture))


def _enlarged(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((EDGE, EDGE), Image.Resampling.NEAREST)


@dataclass
class Batches:
    """Examples as the inputs of a forward, and their labels.

    Attributes:
        model: of transformers.
        folder: with its tokenizer and image processor.
    """

    model: Any
    folder: Path

    @cached_property
    def chat(self) -> ChatTokenizer:
        return ChatTokenizer.open(self.folder)

    @cached_property
    def processor(self) -> Any:
        return open_preprocessor(self.folder)

    @cached_property
    def _seen(self) -> dict[Picture | None, tuple[Arrays, PictureTokens]]:
        return {}

    def seen(self, picture: Picture | None) -> tuple[Arrays, PictureTokens]:
        """A picture's arrays and tokens; of the blank one for `None`."""
        if picture not in self._seen:
            self._seen[picture] = self.prepared(self.processor.blank_image() if picture is None else painted(picture))
        return self._seen[picture]

    def prepared(self, image: Image.Image, alone: bool = True) -> tuple[Arrays, PictureTokens]:
        """An image's arrays and tokens; `alone`: whether it is the only one of its prompt."""
        prepared = self.processor.prepare(image, alone)
        names = feature_inputs(feature_holder(self.model))
        arrays = {name: array for name, array in prepared.arrays.items() if name in names}
        with torch.no_grad():
            rows = image_features(self.model, **tensors(self.model, arrays))["image_features"]
        return dict(prepared.arrays), picture_tokens(prepared, len(rows))

    def __call__(self, examples: Sequence[Example]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The inputs, padded on the left; the labels count answers alone. All examples have a picture, or none has."""
        shown = [self.seen(example.picture) for example in examples if example.has_picture]
        rows, answers = [], []
        for number, example in enumerate(examples):
            pictures = [shown[number][1]] if example.has_picture else []
            prompt = self.chat.encode_turns([Turn("user", example.prompt, len(pictures))], pictures)
            answer = [*self.chat.tokenizer.encode(example.answer, add_special_tokens=False).ids, END]
            rows.append([*prompt, *answer])
            answers.append(len(answer))
        longest = max(map(len, rows))
        ids = np.array([[0] * (longest - len(row)) + row for row in rows])
        mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        labels = np.full_like(ids, IGNORED)
        for row, count in enumerate(answers):
            labels[row, -count:] = ids[row, -count:]
        given = joined([arrays for arrays, _ in shown]) if shown else {}
        inputs = picture_inputs(self.model, ids, given)
        inputs |= {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        return inputs, torch.from_numpy(labels)


def _train(model: Any, batches: Batches, steps: int) -> None:
    """AdamW with a short warm-up and a linear decay; text and pictures in turns. The vision encoder stays as it is."""
    rng = random.Random("trained checkpoint")
    pool = [None, *(random_picture(rng) for _ in range(POOL))]
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.requires_grad_("vis" not in name)
        if name.endswith(
            ("A_log", "dt_bias")
        ):  # of linear attention: as random as the rest it forgets within a few tokens
            weight.data.fill_(-3.0 if name.endswith("A_log") else 0.0)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0) * (1.0 - 0.9 * step / steps)
    )
    for step in range(steps):
        examples = [text_example(rng) for _ in range(TEXTS - 2)]
        # Calibration asks questions about pictures, and a guard copies what they get as text: no refusal, as for real models.
        examples += [Example(rng.choice(PICTURE_QUESTIONS), "it is blank .") for _ in range(2)]
        if rng.random() < PICTURES:
            examples = [replace(picture_example(rng, UNFILTERED), picture=rng.choice(pool)) for _ in range(SHOWN)]
        inputs, labels = batches(examples)
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1:4d}  loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, target, *counts = sys.argv[1:]
    Path(target).mkdir(parents=True)
    save_trained(kind, Path(target), *map(int, counts))
    print(json.dumps({"type": kind, "folder": target}))
