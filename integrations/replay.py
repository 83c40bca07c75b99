"""Replaying the cases in a runtime that Python drives, and writing down what came of it; numpy only.

A runtime's environment may hold no more than the runtime, so nothing here imports vlmguard. What runtimes without Python
write has the same form: `build/integrations/NAME.json`, one object, or a list where a folder has several runtimes:

    {"runtime": "OpenVINO (CPU)", "version": "2026.3.1", "command": "make integration NAME=openvino", "note": "",
     "modes": {"restore": {"largest_difference": 1.2e-06, "tokens": 48, "same_tokens": true}, ...}}

`largest_difference` is the largest |logit - onnxruntime CPU's logit| of the same guarded graph, over every call of every case;
`tokens` counts what was generated, `same_tokens` says whether it was the same greedy answers. A mode that a runtime cannot run
is not in `modes`, and `note` says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

BUILD = Path(__file__).parents[1] / "build" / "integrations"
CASES = BUILD / "cases"
# Logits of the tiny VLM are between -15 and 25; another layer guarded, or none, is off by more than 1.
LIMIT = 1e-3

Feeds = Mapping[str, np.ndarray]
Run = Callable[[Feeds], Feeds]  # every input by name -> every output by name


@dataclass(frozen=True)
class Agreement:
    """How a runtime compares with onnxruntime's CPU provider in one mode; `limit` bounds the difference."""

    largest_difference: float
    tokens: int
    same_tokens: bool
    limit: float = LIMIT

    @property
    def ok(self) -> bool:
        return self.same_tokens and self.tokens > 0 and self.largest_difference <= self.limit  # and so not NaN


@dataclass(frozen=True)
class CaseFolder:
    """One mode's cases, as `integrations/cases.py` wrote them."""

    folder: Path

    @property
    def content(self) -> dict[str, Any]:
        return json.loads((self.folder / "cases.json").read_text(encoding="utf-8"))

    def model(self, part: str) -> Path:
        """The file of `decoder`, `embed_tokens` or `vision_encoder`."""
        return self.folder / "model" / self.content["model"][part]

    def tensor(self, shown: Mapping[str, Any]) -> np.ndarray:
        dtype = np.dtype(shown["dtype"]).newbyteorder("<")
        count = int(np.prod(shown["shape"]))
        flat = np.fromfile(self.folder / "tensors.bin", dtype, count, offset=shown["offset"])
        assert flat.size == count, f"{self.folder / 'tensors.bin'} ends early; run python -m integrations.cases again"
        return flat.astype(dtype.newbyteorder("=")).reshape(shown["shape"])


def mode_folders(cases: Path = CASES) -> Iterable[tuple[str, CaseFolder]]:
    """Every mode that has been written, with its cases."""
    found = [path.parent for path in sorted(cases.glob("*/cases.json"))]
    assert found, f"{cases}: holds no cases; run python -m integrations.cases first"
    return [(folder.name, CaseFolder(folder)) for folder in found]


def replay(folder: CaseFolder, decoder: Run, embed: Run | None = None, look: Run | None = None) -> Agreement:
    """Run every call of every case.

    Args:
        decoder: the guarded decoder.
        embed: the embeddings; given, their output (with the image features in place) is what the decoder is fed.
        look: the vision encoder; given, its output are those features.
    """
    content = folder.content
    worst, tokens, same = 0.0, 0, True
    for case in content["cases"]:
        features = None
        if case["pixel_values"] is not None:
            features = folder.tensor(case["image_features"])
            if look is not None:
                features = next(iter(look({"pixel_values": folder.tensor(case["pixel_values"])}).values()))
        given: list[Feeds] = []
        for call in case["calls"]:
            feeds = {name: _fed(folder, fed, given) for name, fed in call["feeds"].items()}
            if embed is not None:
                ids = folder.tensor(call["input_ids"])
                embeds = np.array(next(iter(embed({"input_ids": ids}).values())))
                at = ids == content["image_token_id"]
                if at.any():
                    assert features is not None
                    embeds[at] = features.reshape(-1, embeds.shape[-1])
                feeds["inputs_embeds"] = embeds
            given.append({name: np.array(array) for name, array in decoder(feeds).items()})
            logits, expected = given[-1]["logits"], folder.tensor(call["logits"])
            assert logits.shape == expected.shape, (case["name"], logits.shape, expected.shape)
            difference = np.abs(logits - expected).max()
            worst = float(np.maximum(worst, difference))  # NaN stays
            if call["token"] is not None:
                tokens += 1
                same = same and int(logits[0, -1].argmax()) == call["token"]
    return Agreement(worst, tokens, same)


def _fed(folder: CaseFolder, fed: Mapping[str, Any], given: list[Feeds]) -> np.ndarray:
    return given[fed["call"]][fed["output"]] if "call" in fed else folder.tensor(fed)


def write_result(
    name: str,
    runtime: str,
    version: str,
    modes: Mapping[str, Agreement],
    note: str = "",
    build: Path = BUILD,
    precision: str = "fp32",
    pictures: bool = True,
) -> int:
    """Write `build/integrations/NAME.json` and say it.

    Args:
        name: of the folder below `integrations/`.
        runtime: its name in the table.
        version: of the runtime.
        modes: mode -> what was compared.
        note: for the table.
        build: folder of the results.
        precision: of the decoder that ran.
        pictures: whether prompts with pictures ran.

    Returns:
        an exit code: 0 where every mode agrees.
    """
    shown = {
        "runtime": runtime,
        "version": version,
        "modes": {mode: asdict(agreement) for mode, agreement in modes.items()},
        "precision": precision,
        "pictures": pictures,
        "command": f"make integration NAME={name}",
        "note": note,
    }
    build.mkdir(parents=True, exist_ok=True)
    (build / f"{name}.json").write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
    for mode, agreement in modes.items():
        verdict = "agrees" if agreement.ok else "DIFFERS"
        print(f"{runtime} {version}, {mode}: {verdict}, {agreement.tokens} tokens, {agreement.largest_difference:.1e}")
    return 0 if modes and all(agreement.ok for agreement in modes.values()) else 1
