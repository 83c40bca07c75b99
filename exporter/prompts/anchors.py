"""Splits anchors into pairs for extraction and pairs for calibration; no prompt is in both.

`anchors.csv`, beside this module, has 300 English pairs of our own: ten intents with 30 pairs each. The halves of a pair
differ only in the one or two words that make one of them harmful. 140 pairs are terse ("How to ...?"), 160 are phrased like
messages to an assistant ("Can you tell me how to ...?") with twelve openings; the two kinds alternate in the file. Every
prompt names its request in a few words: a direction needs the request, not its details. Of each intent, 12 pairs are for
extraction, 9 for calibration and 9 for the held-out test.
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
        """The record in a directions file: the anchors' name, and a fingerprint of every prompt used for extraction."""
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
