"""Controls of a calibration: the same candidate with its meaning taken away, which must not do as well.

- random directions: rows of noise in place of the SSD, all numbers computed along them. If these refuse as much, the
  directions are not what makes the model refuse.
- shuffled labels: everything fitted to labels dealt out by chance. If these do as well, the labels decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...graphs.directions import Directions, LayerDirections
from ...graphs.errors import GuardError, PromptsUnusable
from ...graphs.modes import guard_mode
from ..evaluation.metrics import Tally
from .candidates import Candidate
from .fitting import FOLDS, Study

ENOUGH_HELD_OUT = 5  # harmful prompts of a setting, on which a control that does as well as the winner means something
_SEED = 0


@dataclass(frozen=True)
class Control:
    """A control on the held-out prompts, beside the winner.

    Attributes:
        name: what it is.
        tally: what it did.
    """

    name: str
    tally: Tally

    def require_failed(self, winner: Tally, base: Tally, budget: float) -> None:
        """Refuse a choice that means nothing.

        Raises:
            GuardError: the control keeps the budget and refuses as many harmful prompts as the winner, in every setting.
            PromptsUnusable: it does, and the held-out prompts are too few to mean anything.
        """
        harmless = [cell for cell in self.tally.cells if cell.label == "harmless"]
        kept = all(cell.rate <= max(budget, base.rate(cell.setting, cell.label)) for cell in harmless)
        if kept and self.tally.worst("harmful") >= winner.worst("harmful"):
            fewest = min(cell.asked for cell in winner.cells if cell.label == "harmful")
            if fewest < ENOUGH_HELD_OUT:
                raise PromptsUnusable(
                    f"the control with {self.name} refuses as much as the chosen guard, on {fewest} held-out harmful prompts: "
                    f"too few to distinguish them; calibrate on at least {FOLDS * (ENOUGH_HELD_OUT - fewest)} more harmful "
                    "prompts in each setting"
                )
            raise GuardError(
                f"the control with {self.name} refuses {self.tally.worst('harmful'):.0%} of the held-out harmful prompts in "
                f"its worst setting, the chosen guard {winner.worst('harmful'):.0%}: the choice means nothing; calibrate on "
                "more prompts, in settings where the unguarded model answers"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "control": self.name,
            "harmful_refused_worst_setting": self.tally.worst("harmful"),
            "harmless_refused_worst_setting": self.tally.worst("harmless"),
        }


def controls_of(study: Study, candidate: Candidate, groups: Sequence[str]) -> Iterator[tuple[str, Study]]:
    """The controls that a mode can have, by name.

    Shuffled labels are none for `project`, which fits nothing to them, and for `supervise`, which sets each prompt to the
    state of its own text whatever its label is.
    """
    yield "random directions", along_random_rows(study, candidate)
    if guard_mode(study.mode).fits_labels:
        yield "shuffled labels", with_shuffled_labels(study, groups)


def along_random_rows(study: Study, candidate: Candidate) -> Study:
    """The study with random orthonormal rows in place of the SSD."""
    layers = {
        layer: LayerDirections(study.directions.layers[layer].ssd[: candidate.rank]) for layer in candidate.layers
    }
    return study.redirected(random_rows(replace(study.directions, layers=layers, recommended_layers=None)))


def random_rows(directions: Directions) -> Directions:
    """The directions with random orthonormal rows, as many in each layer, in place of the SSD."""
    random = np.random.default_rng(_SEED)
    layers = {}
    for number, layer in directions.layers.items():
        rows = np.linalg.qr(random.normal(size=layer.ssd.T.shape))[0].T
        layers[number] = LayerDirections(np.ascontiguousarray(rows, np.float32))
    return replace(directions, layers=layers)


def with_shuffled_labels(study: Study, groups: Sequence[str]) -> Study:
    """The study under labels dealt out by chance, one to each text, as many of each as there were."""
    label_of = {group: prompt.label for group, prompt in zip(groups, study.prompts, strict=True)}
    dealt = np.random.default_rng(_SEED).permutation(list(label_of.values()))
    shuffled = dict(zip(label_of, map(str, dealt), strict=True))
    return study.relabelled([shuffled[group] for group in groups])
