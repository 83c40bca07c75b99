"""A guarded onnxruntime-genai folder, any of the six modes: python answer.py FOLDER PROMPT"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
from tokenizers import Tokenizer

TEMPLATE = "<s>USER: {} ASSISTANT:"  # your model's chat template
COORDINATES = "vlmguard.coordinates"
SUPERVISORS = (
    "vlmguard.supervisor",
    "vlmguard.prompt_supervisor",
)  # the input of supervise and combined, that of align
NO_SUPERVISOR = np.full((1, 1, 1), -1e30, np.float32)  # [batch, guarded layers, rank]: no gate opens
LONGEST = 64


def answer(model: og.Model, ids: list[int], guard: str) -> Iterator[tuple[int, np.ndarray]]:
    """Each token of the likeliest answer, and the logits that it was taken from.

    Args:
        guard: the graph's input for a supervisor, or "": with one the prompt takes two passes, the first of which gets no
            supervisor and gives the coordinates for the second. Without the input genai does not run such a folder.
    """
    supervisor = None
    if guard:
        listener = start(model, ids, guard, NO_SUPERVISOR)
        # A name of its own, because genai takes the array's address and no reference: freed, every later step would read
        # whatever is in that memory by then, and the gate with it.
        supervisor = np.array(listener.get_output(COORDINATES))
    generator = start(model, ids, guard, supervisor)
    if supervisor is not None and guard.endswith("prompt_supervisor"):
        # align: the prompt has run, and no token of the answer is edited. In place: a second `set_model_input` has no effect.
        supervisor[:] = NO_SUPERVISOR
    while not generator.is_done():
        logits = np.array(generator.get_logits())[0, -1]
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0]), logits


def start(model: og.Model, ids: list[int], guard: str, supervisor: np.ndarray | None) -> og.Generator:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + LONGEST, do_sample=False)
    generator = og.Generator(model, params)
    if supervisor is not None:
        generator.set_model_input(guard, supervisor)  # for the prompt and every step
    generator.append_tokens(np.array([ids], np.int32))
    return generator


if __name__ == "__main__":
    folder, prompt = sys.argv[1:]
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")  # or og.Tokenizer, for the kinds that it knows
    graph = Path(folder, "model.onnx").read_bytes()
    guard = next((name for name in SUPERVISORS if name.encode() in graph), "")
    tokens = answer(og.Model(folder), tokenizer.encode(TEMPLATE.format(prompt)).ids, guard)
    print(tokenizer.decode([token for token, _ in tokens]))
