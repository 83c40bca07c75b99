"""An answer with what the gates compared while it was made: for graphs exported with `--telemetry`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..graphs.errors import GuardError
from .generation import Request, Sampling
from .knobs import AS_EXPORTED, Knobs
from .vlm import VisionLanguageModel


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer and its gates.

    Attributes:
        text: the answer.
        layers: the guarded layers.
        thresholds: of each, the offset of the call included.
        scores: `[calls, layers]` float32: row 0 at the end of the prompt, then at each token of the answer that another
            followed.
        held: whether row 0 decides for the whole answer (`--gate prompt`), and not each row for itself.
    """

    text: str
    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    scores: np.ndarray
    held: bool

    @property
    def opened(self) -> np.ndarray:
        """Open gates, `[calls, layers]` bool."""
        over = self.scores > np.array(self.thresholds, np.float32)
        return np.broadcast_to(over[:1], over.shape) if self.held else over

    def to_json(self) -> dict[str, Any]:
        return {
            "answer": self.text,
            "layers": list(self.layers),
            "thresholds": list(self.thresholds),
            "gate": "prompt" if self.held else "token",
            "scores": self.scores.tolist(),
            "opened": self.opened.tolist(),
        }


def scored(
    model: VisionLanguageModel, plan: Mapping[str, Any], request: Request, sampling: Sampling, knobs: Knobs
) -> ScoredAnswer:
    """Answer one request and keep the gate scores of each step.

    Args:
        model: the guarded model.
        plan: the guard's plan from the manifest.
        request: the prompt.
        sampling: how tokens are chosen.
        knobs: values of the runtime controls.

    Raises:
        GuardError: the graph does not output its scores.
    """
    if not model.decoder.outputs_scores:
        raise GuardError("the model does not output its gates' scores; export it again with --telemetry")
    said, rows = "", []
    for piece in model.pieces(request, sampling, knobs):
        said += piece.text
        assert piece.step.gate_scores is not None
        rows.append(np.array(piece.step.gate_scores[0]))
    return scored_answer(plan, said, rows, knobs)


def scored_answer(
    plan: Mapping[str, Any], text: str, rows: Sequence[np.ndarray], knobs: Knobs = AS_EXPORTED
) -> ScoredAnswer:
    """An answer with its gate scores.

    Args:
        plan: the guard's plan from the manifest.
        text: the answer.
        rows: per step the scores `[layers]`.
        knobs: values used for the answer.
    """
    of_layer = {site["layer"]: site["tau"] for site in plan["sites"]}
    thresholds = tuple(of_layer[layer] + (knobs.threshold_offset or 0.0) for layer in plan["layers"])
    return ScoredAnswer(text, tuple(plan["layers"]), thresholds, np.stack(rows), plan["gate"] == "prompt")
