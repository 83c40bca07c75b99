"""`Session`: an opened source, and the one model of it that runs at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..graphs.anatomy import DecoderAnatomy
from ..graphs.package import ModelPackage
from ..graphs.progress import ProgressCallback, ignore_progress
from ..runtime.decoder_place import DecoderPlace
from ..runtime.vlm import VisionLanguageModel
from .last_token_model import last_token_model
from .prompts.labelled import find_file
from .sources import Source

ANCHOR_FILES = ("anchors.jsonl", "anchors.json", "anchors.csv")
CALIBRATION_FILES = ("calibration.jsonl", "calibration.json", "calibration.csv")


@dataclass
class Session:
    """State shared by the functions that resolve directions, make proof inputs and run the model.

    Attributes:
        source: the unguarded model.
        anatomy: of the decoder that runs.
        report_progress: called with `(stage, done, total)`.
        place: where decoders are opened, one at a time.
        notes: sentences for the plan, in the order in which they were found out.
        found: files that were found beside the model and used: what it is -> its absolute path.
    """

    source: Source
    anatomy: DecoderAnatomy
    report_progress: ProgressCallback = ignore_progress
    place: DecoderPlace = field(default_factory=DecoderPlace)
    notes: list[str] = field(default_factory=list)
    found: dict[str, Path] = field(default_factory=dict)
    _model: VisionLanguageModel | None = None

    @property
    def package(self) -> ModelPackage:
        """The unguarded model's files."""
        return self.source.package

    def model(self) -> VisionLanguageModel:
        """The unguarded model, opened at the first call; its decoder computes the logits of the last token alone."""
        if self._model is None:
            self._model = last_token_model(self.package, self.place)
        return self._model

    def release_model(self) -> VisionLanguageModel:
        """The unguarded model for its last use: the session does not hold it any longer."""
        model, self._model = self.model(), None
        return model

    def find(self, what: str, names: Sequence[str]) -> Path | None:
        """A file that comes with the model (`find_file`), recorded in `found` under `what`."""
        path = find_file(self.source.home, names)
        if path is not None:
            self.found[what] = path
        return path

    def find_prompts(self) -> Path | None:
        """The labelled prompts or the anchor pairs that come with the model."""
        return self.find("calibration", CALIBRATION_FILES) or self.find("anchors", ANCHOR_FILES)
