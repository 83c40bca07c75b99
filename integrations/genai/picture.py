"""A guarded picture pipeline of onnxruntime-genai: python picture.py FOLDER PROMPT PICTURE

Modes project, steer and restore need nothing but genai. A guard that reads paired rows (`align --supervisor rows`) needs each
prompt beside its own text: a batch of two, the text in row 0, the prompt in row 1. Other guards with a text-only pass give the
decoder an input that genai's picture pipelines do not feed: genai stops with an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

og: Any = onnxruntime_genai
# your model's chat template, and what stands for a picture in it
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MARKER = "<|vision_start|><|image_pad|><|vision_end|>"
LONGEST = 64


def answer(folder: Path, prompt: str, text: str, images: Any, longest: int = LONGEST) -> Iterator[int]:
    """Tokens of the likeliest answer.

    Args:
        folder: the guarded folder.
        prompt: the chat prompt, with a marker for each picture.
        text: the same prompt without markers.
        images: `og.Images`; `None` for a prompt without pictures.
        longest: number of tokens.
    """
    rows = json.loads((folder / "guard.json").read_text())["spec"].get("supervisor") == "rows" and images is not None
    model = og.Model(str(folder))
    processor = model.create_multimodal_processor()
    inputs = processor(prompt, images=images)
    if rows:
        ids, alone = inputs["input_ids"].as_numpy(), processor(text)["input_ids"].as_numpy()
        padding = json.loads((folder / "genai_config.json").read_text())["model"]["pad_token_id"]
        beside = np.full_like(ids, padding)
        beside[:, : alone.shape[1]] = alone
        inputs["input_ids"] = np.concatenate([beside, ids])
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, batch_size=2 if rows else 1)
    generator = og.Generator(model, params)
    generator.set_inputs(inputs)
    for _ in range(longest):
        if generator.is_done():
            return
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[-1])


if __name__ == "__main__":
    folder, prompt, picture = sys.argv[1:]
    asked, text = TEMPLATE.format(MARKER + prompt), TEMPLATE.format(prompt)
    tokenizer = og.Tokenizer(og.Model(folder))
    print(tokenizer.decode(np.array(list(answer(Path(folder), asked, text, og.Images.open(picture))), np.int32)))
