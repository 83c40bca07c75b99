"""Everything that a report's figures and tables are drawn from, as plain data; `--json` prints it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...exporter.evaluation.yardstick import Yardstick
from ...exporter.prompts.formats import LABELS, SETTINGS
from ...exporter.prompts.labelled import PAIRED_LABELS, LabelledPrompt
from ...graphs.manifest import Manifest
from .cost import Cost
from .gates import GateScores
from .outcomes import Mistake, Rate
from .plane import Plane, fit_plane
from .score_separation import Separation
from .states import States
from .sweep import Strength

SCHEMA = "vlmguard.report/1"


@dataclass(frozen=True)
class LayerPoints:
    """The states of one layer in the plane of their principal components.

    Attributes:
        layer: 0-based.
        explained: share of the unguarded states' variance along each axis.
        before, after: `[prompts, 2]` float64, unguarded and guarded.
    """

    layer: int
    explained: tuple[float, float]
    before: np.ndarray
    after: np.ndarray

    def to_json(self) -> dict[str, Any]:
        points = {"before": self.before.tolist(), "after": self.after.tolist()}
        return {"layer": self.layer, "explained": list(self.explained), **points}


@dataclass(frozen=True)
class ReportData:
    """The prompts and measurements of a report.

    Attributes:
        name: name of the guarded folder.
        prompts_file: name of the prompts file.
        prompts: the prompts that were run.
        max_new_tokens: longest judged answer.
        manifest: the folder's manifest.
        layers: numbers of all decoder layers.
        points, separations, gates: of the prompts with one of `PAIRED_LABELS`.
        yardstick: the guarded model against its own text-only language model; the headline.
        rates, mistakes, sweep, cost: one per figure or table.
        found: kind of each file found beside the model and used -> absolute path. Not in the page, which others read.
        anchors_auc: AUC of the anchors along row 1, by layer, as the directions file recorded it.
    """

    name: str
    prompts_file: str
    prompts: tuple[LabelledPrompt, ...]
    max_new_tokens: int
    manifest: Manifest
    layers: tuple[int, ...]
    points: tuple[LayerPoints, ...]
    separations: tuple[Separation, ...]
    gates: tuple[GateScores, ...]
    yardstick: Yardstick
    rates: tuple[Rate, ...]
    mistakes: tuple[Mistake, ...]
    sweep: tuple[Strength, ...]
    cost: Cost
    anchors_auc: dict[int, float]
    found: Mapping[str, Path] = field(default_factory=dict)

    @property
    def plan(self) -> dict[str, Any]:
        return self.manifest.plan

    @property
    def guarded_layers(self) -> tuple[int, ...]:
        return tuple(self.plan["layers"])

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings of the prompts, in the paper's order."""
        return tuple(setting for setting in SETTINGS if any(prompt.setting == setting for prompt in self.prompts))

    @property
    def drawn(self) -> list[LabelledPrompt]:
        """The prompts that `points` has states of, in its order."""
        return both_labels(self.prompts)

    def counts(self) -> list[tuple[str, str, int]]:
        """`(setting, label, number of prompts)`."""
        found = Counter((prompt.setting, prompt.label) for prompt in self.prompts)
        kinds = ((setting, label) for setting in self.settings for label in LABELS)
        return [(*kind, found[kind]) for kind in kinds if found[kind]]

    def to_json(self) -> dict[str, Any]:
        changed = self.yardstick.text_changed
        lists = ("points", "separations", "gates", "rates", "mistakes", "sweep")
        return {
            "schema": SCHEMA,
            "headline": self.yardstick.headline.sentence,
            "yardstick": self.yardstick.to_json(),
            "name": self.name,
            "mode": self.plan["mode"],
            "guarded_layers": list(self.guarded_layers),
            "layers": list(self.layers),
            "prompts_file": self.prompts_file,
            "prompts": [{"id": p.id, "prompt": p.prompt, "label": p.label, "setting": p.setting} for p in self.prompts],
            **{name: [row.to_json() for row in getattr(self, name)] for name in lists},
            "max_new_tokens": self.max_new_tokens,
            "text_answers_changed": changed.hits if changed is not None else 0,
            "cost": self.cost.to_json(),
            "anchors_auc": {str(layer): value for layer, value in self.anchors_auc.items()},
        }


def both_labels(prompts: Sequence[LabelledPrompt]) -> list[LabelledPrompt]:
    """The harmful and the harmless prompts, whose hidden states are compared; borderline ones are neither kind."""
    return [prompt for prompt in prompts if prompt.label in PAIRED_LABELS]


def layer_points(states: States, prompts: Sequence[LabelledPrompt], layers: Sequence[int]) -> list[LayerPoints]:
    """Both sides of every layer in the plane that its unguarded states have."""
    harmful = np.array([prompt.label == "harmful" for prompt in prompts])
    found = []
    for row, layer in enumerate(layers):
        plane: Plane = fit_plane(states.before[:, row], harmful)
        before, after = plane.place(states.before[:, row]), plane.place(states.after[:, row])
        found.append(LayerPoints(layer, plane.explained, before, after))
    return found
