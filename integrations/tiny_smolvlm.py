"""SmolVLM's layout: a tiny SmolVLM with random weights, guarded in mode restore, and what `GuardedVLM` computes with pictures.

    PYTHONPATH=tests python -m integrations.tiny_smolvlm      # writes build/integrations/smolvlm

    model/, unguarded/   the guarded folder, and the model that it was made from
    images/              the pictures
    cases.json           cases[]: name, prompt, image (a file of images/, or null), one_colour (whether the picture is of one),
                         input_ids, tokens (with the end-of-sequence token), answer, logits[] (at each call's last position);
                         unguarded: its tokens, answer and logits

SmolVLM's own chat template, its markers around each tile, and `<end_of_utterance>` as the end of an answer. The model knows
nothing: what matters is that another runtime computes the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from random_directions import random_directions, write_directions  # tests/
from safetensors.numpy import load_file, save_file
from tiny_families import LAYERS, save_tiny  # tests/
from tiny_models import TEXT_WIDTH, VOCABULARY_SIZE  # tests/
from tokenizers import AddedToken, Tokenizer

import vlmguard
from integrations.replay import BUILD
from integrations.tiny_vlm import MODEL_AND_CODE, digest_of
from vlmguard.exporter.checkpoints.convert import convert_checkpoint
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.guarded import GuardedVLM
from vlmguard.runtime.vlm import VisionLanguageModel

SMOLVLM = BUILD / "smolvlm"
MAX_NEW_TOKENS = 12
START, END = "<|im_start|>", "<end_of_utterance>"
# Of SmolVLM-256M-Instruct.
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Of SmolVLM's preprocessor_config.json, but for its sizes.
IMAGE_PROCESSOR = {
    "processor_class": "SmolVLMProcessor",
    **dict.fromkeys(
        ("do_convert_rgb", "do_image_splitting", "do_normalize", "do_pad", "do_rescale", "do_resize"), True
    ),
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 1,
    "rescale_factor": 1 / 255,
}
TILE, MOST = 16, 3  # pixels; tiles in a row
# `(width, height)`. The model resizes the longer side to 48 pixels and cuts tiles of 16.
SIZES = {"wide": (61, 30), "tall": (20, 47), "band": (90, 14), "column": (9, 70), "small": (5, 3), "grid": (32, 32)}
# One colour stays what it is under every resampling, so a runtime that resizes otherwise than Pillow gets the same pixels.
COLOURS = {
    "red-wide": ((48, 20), (200, 30, 40)),
    "blue-tall": ((13, 64), (10, 60, 220)),
    "grey": ((16, 16), (90, 90, 90)),
}
PROMPTS = ("how do I make a cake", "how do I make a bomb")


def main() -> int:
    write_smolvlm()
    return 0


def write_smolvlm(folder: Path = SMOLVLM) -> Path:
    """Write everything; what is there from the same sources stays.

    Returns:
        the folder.
    """
    stamp = digest_of(*MODEL_AND_CODE, "integrations/*.py", "tests/tiny_*.py", "tests/random_directions.py")
    if (folder / "sources").is_file() and (folder / "sources").read_text() == stamp:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    convert_checkpoint(_checkpoint(folder / "checkpoint"), folder / "unguarded")
    directions = random_directions(TEXT_WIDTH, range(LAYERS))
    vlmguard.export(
        folder / "unguarded",
        folder / "model",
        spec=GuardSpec(mode="restore", layers=tuple(range(LAYERS)), rank=2),
        directions=write_directions(folder / "directions.safetensors", directions),
    )
    _write_cases(folder)
    (folder / "sources").write_text(stamp)
    return folder


def _checkpoint(folder: Path) -> Path:
    """A checkpoint in torch's form, with SmolVLM's template, start and end, and a word for every id."""
    save_tiny("smolvlm", folder)
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    places = [f"<row_{row}_col_{column}>" for row in range(1, MOST + 1) for column in range(1, MOST + 1)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, *places)])
    tokenizer.add_tokens([f"word{number}" for number in range(tokenizer.get_vocab_size(), VOCABULARY_SIZE)])
    tokenizer.save(str(path))
    end = tokenizer.token_to_id(END)
    _edit(folder / "tokenizer_config.json", bos_token=START, eos_token=END)
    _edit(folder / "generation_config.json", eos_token_id=end, bos_token_id=tokenizer.token_to_id(START))
    _edit(folder / "preprocessor_config.json", size={"longest_edge": MOST * TILE}, **IMAGE_PROCESSOR)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][end] *= 2  # so that some answers end
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes, indent=2), encoding="utf-8")


def _pictures() -> Mapping[str, Image.Image]:
    random = np.random.default_rng(7)
    noise = {
        name: Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        for name, (width, height) in SIZES.items()
    }
    return noise | {name: Image.new("RGB", size, colour) for name, (size, colour) in COLOURS.items()}


def _write_cases(folder: Path) -> None:
    """Ask both models about every picture, and without one.

    Raises:
        AssertionError: no answer ends, or none goes on, or the guard changes no answer, or every picture is cut alike.
    """
    guarded = GuardedVLM.open(folder / "model", runtime="onnxruntime-cpu")
    unguarded = VisionLanguageModel(open_package(folder / "unguarded"), runtime="onnxruntime-cpu")
    cases = []
    for number, (name, picture) in enumerate({**_pictures(), "text": None}.items()):
        if picture is not None:
            picture.save(folder / "images" / f"{name}.png")
        request = Request(PROMPTS[number % len(PROMPTS)], picture)
        case = {
            "name": name,
            "prompt": request.prompt,
            "image": f"{name}.png" if picture is not None else None,
            "one_colour": name in COLOURS,
            "input_ids": guarded.batch([request]).ids[0].tolist(),
        }
        cases.append(case | _answer(guarded, request) | {"unguarded": _answer(unguarded, request)})
    ends = {len(case["tokens"]) < MAX_NEW_TOKENS for case in cases}
    assert ends == {True, False}, [case["tokens"] for case in cases]
    assert any(case["tokens"] != case["unguarded"]["tokens"] for case in cases)
    assert len({len(case["input_ids"]) for case in cases}) > 3
    (folder / "cases.json").write_text(json.dumps({"cases": cases}, indent=1) + "\n", encoding="utf-8")


def _answer(model: VisionLanguageModel, request: Request) -> dict[str, Any]:
    steps = list(model.steps([request], Sampling(MAX_NEW_TOKENS)))
    logits = [model.decoder.last_logits(step.outputs)[0] for step in steps]
    spoken = [step.tokens[0] for step in steps if step.tokens[0] is not None]
    return {
        "tokens": [int(row.argmax()) for row in logits],
        "answer": model.chat.decode(spoken).strip(),
        "logits": [row.tolist() for row in logits],
    }


if __name__ == "__main__":
    raise SystemExit(main())
