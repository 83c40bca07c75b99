"""Which anchors to extract from, and which to keep back for calibration: no prompt serves both.

`anchors.csv`, beside this module, holds 300 pairs of ours in English: ten intents, 30 pairs each. The halves of a pair have the
same words but for the one or two that make one of them harmful, in the same places. 140 pairs are terse ("How to ...?"), 160
are phrased as people write to assistants ("Can you tell me how to ...?"), in twelve openings; the two take turns in the file.
All name the request in a few words and nothing else: a direction needs the request, not its details. Of each intent 12
pairs are for extraction, 9 for calibration, 9 for the held-out test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...graphs.errors import PromptsUnusable
from ..calibration.fitting import FEWEST_FOLDS
from .labelled import (
    BUILTIN,
    AnchorPair,
    LabelledPrompt,
    Sources,
    file_of,
    fingerprint,
    is_builtin,
    listed,
    name_of,
    prompts_from_anchors,
    read_anchors,
    read_set,
)


@dataclass(frozen=True)
class Anchors:
    """Anchor pairs from one place.

    Attributes:
        name: the sources, as they were given.
        title: the same, shorter: without folders, and with the part that is taken.
        pairs: to extract from.
        kept_back: of a source that is divided into splits, its own pairs for calibration; otherwise empty.
        folder: where the (first) file is; calibration prompts may lie beside it.
    """

    name: str
    title: str
    pairs: tuple[AnchorPair, ...]
    kept_back: tuple[AnchorPair, ...]
    folder: Path | None

    def divided(self, extracts: bool) -> tuple[Anchors, tuple[AnchorPair, ...]]:
        """`(what to extract from, what to calibrate on)`.

        A divided source has both. Of others every third pair is kept back where something is extracted from the rest
        (`extracts`), and all of them serve calibration where nothing is.

        Raises:
            PromptsUnusable: too few for both.
        """
        if self.kept_back:
            return self, self.kept_back
        if not extracts:
            return self, self.pairs
        kept, rest = self.pairs[::3], tuple(pair for number, pair in enumerate(self.pairs) if number % 3)
        if len(kept) < FEWEST_FOLDS:
            fewest = 3 * (FEWEST_FOLDS - 1) + 1
            raise PromptsUnusable(
                f"{self.name}: too few anchors to extract and calibrate on; give at least {fewest} pairs"
            )
        return replace(self, pairs=rest), kept

    def record(self) -> dict[str, Any]:
        """What a directions file keeps: their name, and a fingerprint of every prompt extracted from."""
        return {"source": self.title, "fingerprints": sorted({fingerprint(prompt) for prompt in _as_text(self.pairs)})}


def open_anchors(sources: Sources = BUILTIN) -> Anchors:
    """The anchors of one source or several; without any, the built-in ones.

    Raises:
        PromptsUnusable: as `read_anchors`.
    """
    names = listed(sources)
    pairs = tuple(read_anchors(names))
    kept_back: tuple[AnchorPair, ...] = ()
    if any(pair.split for pair in pairs):
        sets = [read_set(name, "calibration", "anchors") for name in names]
        kept_back = tuple(pair for found in sets for pair in found.pairs if pair.split == "calibration")
    titles = [f"{name}:extraction" if name == BUILTIN else name_of(name) for name in names]
    folder = None if is_builtin(names[0]) else file_of(names[0]).parent
    return Anchors(", ".join(names), ", ".join(titles), pairs, kept_back, folder)


def _as_text(pairs: Sequence[AnchorPair]) -> list[LabelledPrompt]:
    return prompts_from_anchors(pairs, sees=False)
