"""The playground's page (onnxruntime-web: WebAssembly, WebGPU) against the cases; it is told prompts and pictures, no tensors.

So tokenizer, chat template, picture, text-only pass and KV cache are the page's own. Its base side is compared with the
unguarded model in the same way.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from browser import CHROMIUM, NO_CHROMIUM, Browser  # tests/browser.py

from integrations.replay import BUILD, Agreement, CaseFolder, mode_folders, write_result
from integrations.tiny_smolvlm import write_smolvlm
from vlmguard.apps.playground.libraries import LIBRARIES
from vlmguard.apps.playground.open import playground
from vlmguard.graphs.layouts import open_package
from vlmguard.runtime.generation import Request, Sampling
from vlmguard.runtime.vlm import VisionLanguageModel

SOURCE = Path(__file__).parents[2] / "examples" / "tiny_vlm" / "onnx-community"
NAME = "browser"
ASK = """async ({ provider, prompt, picture, most }) => {
  const { Engine } = await import("/engine.mjs");
  window.engine ??= new Engine(provider);
  const bytes = picture === null ? null : Uint8Array.from(atob(picture), (letter) => letter.charCodeAt(0));
  const steps = [];
  for await (const step of window.engine.ask({ prompt, picture: bytes && new Blob([bytes]), most, withLogits: true })) {
    steps.push({ ...step, logits: Array.from(step.logits) });
  }
  return steps;
}"""

# WebGPU's sin and cos may be off by 2^-11, which the rotary positions pass on: a model with random weights attends more sharply
# than a trained one. A wrong attention mask was off by 0.36 and more.
RANDOM_ON_WEBGPU = 5e-3

Rows = Sequence[tuple[np.ndarray, int]]  # logits at the last position and the token, call by call


@dataclass(frozen=True)
class Question:
    """A prompt with a picture or without one, and what both sides compute in Python."""

    prompt: str
    picture: Path | None
    guarded: Rows
    base: Rows


def main() -> int:
    if CHROMIUM is None:
        sys.exit(NO_CHROMIUM)
    version = next(library.version for library in LIBRARIES if library.name == "onnxruntime-web")
    smolvlm = write_smolvlm()
    parts, codes = [], []

    def write(runtime: str, modes: Mapping[str, Agreement], note: str) -> None:
        codes.append(write_result(NAME, runtime, version, modes, note))
        parts.append(json.loads((BUILD / f"{NAME}.json").read_text(encoding="utf-8")))

    for provider, title in (("wasm", "WebAssembly"), ("webgpu", "WebGPU")):
        note = "`vlmguard playground`, in Chromium"
        note += " on SwiftShader, a GPU in software" if provider == "webgpu" else ""
        with Browser(gpu=provider == "webgpu") as browser:
            modes = {
                mode: ask_the_page(browser, folder.folder / "model", mode_questions(folder), provider)
                for mode, folder in mode_folders()
            }
            write(f"onnxruntime-web ({title})", modes, note)
            agreement = ask_about_tiles(browser, smolvlm, provider)
            shapes = "a tiny random SmolVLM, pictures of nine sizes as tiles"
            write(f"onnxruntime-web ({title}), SmolVLM's layout", {"restore": agreement}, f"{note}; {shapes}")
    (BUILD / f"{NAME}.json").write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    return max(codes)


def mode_questions(folder: CaseFolder) -> list[Question]:
    """Every case of a mode of the tiny VLM."""
    unguarded = VisionLanguageModel(open_package(SOURCE), runtime="onnxruntime-cpu")
    questions = []
    for case in folder.content["cases"]:
        picture = folder.folder / "images" / case["image"] if case["image"] else None
        base = _asked(unguarded, case["prompt"], picture, len(case["tokens"]))
        questions.append(Question(case["prompt"], picture, _expected(folder, case), base))
    return questions


def tile_questions(folder: Path) -> list[Question]:
    """Every case of `integrations/tiny_smolvlm.py`."""

    def rows(answer: Mapping[str, Any]) -> Rows:
        return [(np.array(row), token) for row, token in zip(answer["logits"], answer["tokens"], strict=True)]

    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    return [
        Question(
            case["prompt"],
            folder / "images" / case["image"] if case["image"] else None,
            rows(case),
            rows(case["unguarded"]),
        )
        for case in cases
    ]


def ask_about_tiles(browser: Browser, smolvlm: Path, provider: str) -> Agreement:
    """Every case of `integrations/tiny_smolvlm.py`, pictures first, then text: as `ask_the_page`."""
    agreement = ask_the_page(browser, smolvlm / "model", tile_questions(smolvlm), provider)
    return replace(agreement, limit=RANDOM_ON_WEBGPU) if provider == "webgpu" else agreement


def ask_the_page(browser: Browser, model: Path, questions: Sequence[Question], provider: str) -> Agreement:
    """Every question to a guarded folder's page, both sides.

    Args:
        browser: with a GPU, if the provider needs one.
        model: the guarded folder.
        questions: with what both sides compute in Python.
        provider: `wasm` or `webgpu`.

    Raises:
        AssertionError: the page said something in the console, or asked another server.
    """
    with page_of(model) as url:
        browser.open(url, "[data-ready=true]", 1200)
        agreements = []
        for question in questions:
            steps = browser.page.evaluate(ASK, _message(question, provider))
            agreements.append(_agreement(steps, "guarded", question.guarded))
            agreements.append(_agreement(steps, "base", question.base))
        assert browser.said == [], browser.said
        assert all(address.startswith((url, f"blob:{url}")) for address in browser.asked), browser.asked
    worst = float(np.max([agreement.largest_difference for agreement in agreements]))  # NaN stays
    tokens = sum(agreement.tokens for agreement in agreements)
    return Agreement(worst, tokens, all(agreement.same_tokens for agreement in agreements))


@contextmanager
def page_of(guarded: Path) -> Iterator[str]:
    """The address of a guarded folder's page, while it is served."""
    with playground(guarded, port=0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


def _message(question: Question, provider: str) -> dict[str, Any]:
    """`ASK`'s argument."""
    picture = None if question.picture is None else base64.b64encode(question.picture.read_bytes()).decode()
    most = max(len(question.guarded), len(question.base))
    return {"provider": provider, "prompt": question.prompt, "picture": picture, "most": most}


def _expected(folder: CaseFolder, case: Mapping[str, Any]) -> Rows:
    """What onnxruntime's CPU provider computed, as the cases have it."""
    calls = [call for call in case["calls"] if call["token"] is not None]
    return [(folder.tensor(call["logits"])[0, -1], call["token"]) for call in calls]


def _asked(model: VisionLanguageModel, prompt: str, picture: Path | None, most: int) -> Rows:
    steps = model.steps([Request(prompt, picture)], Sampling(most))
    return [(logits := model.decoder.last_logits(step.outputs)[0], int(logits.argmax())) for step in steps]


def _agreement(steps: Sequence[Mapping[str, Any]], side: str, expected: Rows) -> Agreement:
    shown = [step for step in steps if step["side"] == side]
    assert expected and len(shown) == len(expected), (side, len(shown), len(expected))
    worst = np.max([np.abs(np.array(s["logits"]) - row).max() for s, (row, _) in zip(shown, expected, strict=True)])
    same = all(s["token"] == token for s, (_, token) in zip(shown, expected, strict=True))
    return Agreement(float(worst), len(expected), same)


if __name__ == "__main__":
    sys.exit(main())
