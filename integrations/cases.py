"""What every runtime is compared on: the tiny VLM, guarded in each mode, and what onnxruntime's CPU provider computes.

    python -m integrations.cases [FOLDER] [--mode MODE]     # FOLDER: build/integrations/cases

writes, for each of the six modes,

    <mode>/model/        the guarded folder, as an app would get it
    <mode>/images/       the pictures that the cases show
    <mode>/cases.json    the cases, schema below
    <mode>/tensors.bin   every tensor of them: raw, little-endian, C order, each at a multiple of 64 bytes

so that a runtime without Python needs a JSON parser and one file. `cases.json`:

    mode, guarded_layers, eos_ids, image_token_id
    model                 {"decoder", "embed_tokens", "vision_encoder"}: files, relative to <mode>/model
    cases[]               one question each:
      name, prompt, label, image          image: file relative to <mode>/images, or null
      gate_open                           at the end of the prompt: true, false, or null (project and align have no gate)
      pixel_values, image_features        tensors: what goes into the vision encoder and what comes out, or null
      tokens, answer                      the greedy answer, with its end-of-sequence token if it got there
      calls[]                             every call of the decoder that gives this answer, in order:
        what                              "text-only" (modes with a supervisor, first), "prompt", "step"
        input_ids                         tensor: the call's tokens; their embeddings, with the features at image_token_id, are
                                          its inputs_embeds
        feeds                             every input by name: a tensor, or {"call": i, "output": name}: what call i gave
        logits                            tensor [1, tokens of the call, vocabulary]
        token                             the likeliest next one; null in the text-only call

A tensor is {"offset", "dtype", "shape"}: bytes into tensors.bin; `float32` or `int64`; a shape may hold a 0 (an empty cache).
Replaying `calls` in order needs no knowledge of caches or guards; `integrations/replay.py` does it in Python.

All modes come from one calibration (`tiny_vlm.py`). Every expectation is compared with
`NumpyDecoder`, which never saw the graph, before it is written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import vlmguard
from integrations.numpy_vlm import ORACLE_LIMIT, NumpyDecoder
from integrations.replay import CASES
from integrations.tiny_vlm import (
    CHECKPOINT,
    MODEL_AND_CODE,
    MODES,
    PROMPTS,
    SOURCE,
    calibrated_directions,
    digest_of,
    plan_of,
    spec_of,
)
from vlmguard.exporter.prompts.labelled import LabelledPrompt, read_prompts
from vlmguard.graphs.modes import Mode, guard_mode
from vlmguard.graphs.plan import COORDINATES_OUTPUT, GuardPlan
from vlmguard.graphs.reference import NO_SUPERVISOR
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.images.images import ImagePreprocessor
from vlmguard.runtime.runner_protocol import Runner
from vlmguard.runtime.runners import open_runner

# Held-out prompts, by id: as text, with a blank image, with one that matters, with harm that is in the picture alone.
ASKED = {
    "evaluation.jsonl": (
        "text-harmful-steal-0",
        "text-harmless-wash-0",
        "blank-harmful-steal-0",
        "image-harmful-steal-0",
        "image-harmless-wash-0",
    ),
    "evaluation-typographic.jsonl": ("typographic-harmful-steal-0",),
}
MAX_NEW_TOKENS = 24
ALIGNMENT = 64  # bytes; typed arrays want 8


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, nargs="?", default=CASES)
    options.add_argument("--mode", choices=MODES, action="append", help="this mode alone (repeat for more)")
    wished = options.parse_args()
    for mode in MODES:
        if not wished.mode or mode in wished.mode:
            print(f"cases of mode {mode} ...", file=sys.stderr, flush=True)
            write_mode(mode, wished.folder)
    return 0


def write_mode(mode: Mode, folder: Path) -> Path:
    """Guard the tiny VLM and write the cases of one mode; what is there from the same sources stays.

    Returns:
        the mode's folder.
    """
    out, stamp = folder / mode, digest_of(*MODEL_AND_CODE, "integrations/*.py")
    if (out / "sources").is_file() and (out / "sources").read_text() == stamp:
        return out
    directions = calibrated_directions(folder / "directions")
    shutil.rmtree(out, ignore_errors=True)
    vlmguard.export(SOURCE, out / "model", spec=spec_of(mode, directions), directions=directions)
    write_cases(mode, out)
    (out / "sources").write_text(stamp)
    return out


def write_cases(mode: Mode, out: Path) -> None:
    """Ask the guarded folder `out/model`, and write `cases.json`, `tensors.bin` and `images/` beside it.

    Raises:
        AssertionError: onnxruntime and the numpy oracle differ, or no gate opens, or none stays closed.
    """
    vlm = vlmguard.GuardedVLM.open(out / "model", runtime="onnxruntime-cpu")
    package = vlm.package
    held = {prompt.id: prompt for name in ASKED for prompt in read_prompts([PROMPTS / name])}
    asked = [held[one] for ids in ASKED.values() for one in ids]
    plan = plan_of(out / "model", SOURCE)
    with Tensors(out / "tensors.bin") as tensors:
        asker = Asker(vlm, plan, tensors, out)
        cases = [asker.case(prompt) for prompt in asked]
    gates = {case["gate_open"] for case in cases}
    assert gates == ({True, False} if guard_mode(mode).has_threshold else {None}), (
        f"{mode}: gates are {gates}; ask other prompts"
    )
    parts = {"decoder": package.decoder, "embed_tokens": package.embed_tokens, "vision_encoder": package.vision_encoder}
    shown = {
        "mode": mode,
        "guarded_layers": list(plan.layers),
        "eos_ids": sorted(vlm.chat.eos_ids),
        "image_token_id": vlm.chat.image_token_id,
        "model": {name: path.relative_to(package.root).as_posix() for name, path in parts.items() if path is not None},
        "cases": cases,
    }
    (out / "cases.json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")


class Tensors:
    """A file of raw tensors, written one behind the other."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, array: np.ndarray) -> dict[str, Any]:
        """Where and what it is."""
        assert array.dtype in (np.float32, np.int64), array.dtype
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
        return {"offset": offset, "dtype": array.dtype.name, "shape": list(array.shape)}


@dataclass(frozen=True)
class Call:
    """One run of the decoder: what went in, and what came out."""

    feeds: Mapping[str, np.ndarray]
    given: Mapping[str, np.ndarray]

    @property
    def token(self) -> int:
        """The likeliest next one."""
        return int(self.given["logits"][0, -1].argmax())


class Recorder:
    """A runner that remembers what went in and what came out."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.inputs, self.outputs = runner.inputs, runner.outputs
        self.calls: list[Call] = []

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = self._runner.run(feeds)
        self.calls.append(Call(dict(feeds), given))
        return given


class Asker:
    """Makes cases of prompts, with one guarded model.

    Args:
        out: the mode's folder, for pictures.
    """

    def __init__(self, vlm: vlmguard.GuardedVLM, plan: GuardPlan, tensors: Tensors, out: Path) -> None:
        self._vlm, self._plan, self._tensors, self._out = vlm, plan, tensors, out
        self._oracle = NumpyDecoder(CHECKPOINT, plan)
        self._decoder = Recorder(vlm.decoder.runner)
        vlm.decoder.runner = self._decoder
        encoder = vlm.package.vision_encoder
        assert encoder is not None and isinstance(vlm.images, ImagePreprocessor)
        self._images = vlm.images
        self._encoder = open_runner(encoder, encoder.parent, "onnxruntime-cpu")

    def case(self, prompt: LabelledPrompt) -> dict[str, Any]:
        """One question as `cases.json` has it."""
        picture = self._picture(prompt)
        request = Request(prompt.prompt, picture)
        steps = list(self._vlm.steps([request], Sampling(max_new_tokens=MAX_NEW_TOKENS)))
        calls, self._decoder.calls = self._decoder.calls, []
        told = None if len(calls) == len(steps) else calls[0].given[COORDINATES_OUTPUT][0]
        answer = calls[len(calls) - len(steps) :]
        for call, step in zip(answer, steps, strict=True):
            assert step.tokens[0] in (call.token, None)
        self._anchor(calls, answer, told)
        texts = [replace(request, image=None)] * (told is not None)
        batches = [self._vlm.batch([one]) for one in (*texts, request)]
        ids = [batch.ids for batch in batches] + [np.array([[call.token]], np.int64) for call in answer[:-1]]
        what = ["text-only"] * len(texts) + ["prompt"] + ["step"] * (len(answer) - 1)
        tokens = [call.token for call in answer]
        pixels = None if picture is None else self._images.pixel_values([picture])
        return {
            "name": f"{prompt.setting}-{prompt.label}",
            "prompt": prompt.prompt,
            "label": prompt.label,
            "image": None if picture is None else picture.name,
            "gate_open": self._gate(answer[0], told),
            "pixel_values": None if pixels is None else self._tensors.add(pixels),
            "image_features": None if pixels is None else self._tensors.add(self._features(pixels)),
            "tokens": tokens,
            "answer": self._vlm.chat.decode([t for t in tokens if t not in self._vlm.chat.eos_ids]).strip(),
            "calls": [
                self._call(*one, calls[:number]) for number, one in enumerate(zip(what, ids, calls, strict=True))
            ],
        }

    def _picture(self, prompt: LabelledPrompt) -> Path | None:
        """The prompt's picture, in the mode's folder."""
        if prompt.setting == "text":
            return None
        kept = self._out / "images" / ("blank.png" if prompt.image is None else prompt.image.name)
        kept.parent.mkdir(exist_ok=True)
        if prompt.image is None:
            self._vlm.blank_image().save(kept)
        else:
            shutil.copyfile(prompt.image, kept)
        return kept

    def _features(self, pixels: np.ndarray) -> np.ndarray:
        (name,) = self._encoder.inputs
        return next(iter(self._encoder.run({name: pixels}).values()))

    def _call(self, what: str, ids: np.ndarray, call: Call, before: Sequence[Call]) -> dict[str, Any]:
        feeds: dict[str, Any] = {}
        for name, fed in call.feeds.items():
            came_from = [(n, o) for n, one in enumerate(before) for o, given in one.given.items() if given is fed]
            feeds[name] = (
                dict(zip(("call", "output"), came_from[0], strict=True)) if came_from else self._tensors.add(fed)
            )
        token = None if what == "text-only" else call.token
        logits = self._tensors.add(call.given["logits"])
        return {"what": what, "input_ids": self._tensors.add(ids), "feeds": feeds, "logits": logits, "token": token}

    def _anchor(self, calls: Sequence[Call], answer: Sequence[Call], told: np.ndarray | None) -> None:
        """What onnxruntime gave is what the numpy oracle gives: the answer's logits, and the text-only pass.

        Raises:
            AssertionError: it is not.
        """
        prompt = answer[0].feeds["inputs_embeds"].shape[1]
        sequence = np.concatenate([call.feeds["inputs_embeds"][0] for call in answer])
        expected = self._oracle.run(sequence, prompt, told)["logits"]
        found = np.concatenate([call.given["logits"][0] for call in answer])
        _require_close(found, expected, "logits")
        if told is not None:
            text = calls[0].feeds["inputs_embeds"][0]
            listening = self._oracle.run(text, len(text), np.full(told.shape, NO_SUPERVISOR))
            _require_close(calls[0].given["logits"][0], listening["logits"], "logits of the text-only pass")
            _require_close(told, listening["coordinates"], "coordinates of the text-only pass")

    def _gate(self, prompt: Call, told: np.ndarray | None) -> bool | None:
        """Whether any layer's gate is open at the end of the prompt, as the oracle says."""
        if not guard_mode(self._plan.mode).has_threshold:
            return None
        embeds = prompt.feeds["inputs_embeds"][0]
        return bool(self._oracle.run(embeds, len(embeds), told)["gates"].any())


def _require_close(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    assert found.shape == expected.shape and found.size, (what, found.shape, expected.shape)
    worst = float(np.abs(found - expected).max())
    assert worst < ORACLE_LIMIT, f"{what}: onnxruntime and the numpy oracle differ by {worst}"


if __name__ == "__main__":
    sys.exit(main())
