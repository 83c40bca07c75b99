"""A setting that opens the gap where blank pictures and noise do not: the worst soft image that a short search finds."""

from __future__ import annotations

from ...graphs.errors import GuardError
from ...graphs.progress import ProgressCallback
from ...runtime.generation import Request
from .align_judge import FEWEST_CONTROLLED, AlignJudge
from .judged import Setting
from .soft_images import worst_images

NAME = "worst soft image"
_SEARCHED = 4  # harmful prompts
_CALLS = 48  # of the decoder: about 15 images, besides what judging them takes


def worst_setting(judge: AlignJudge, report_progress: ProgressCallback) -> Setting | None:
    """The judged texts with the worst soft image.

    Args:
        judge: a judge that has not run a guard yet.
        report_progress: called with `(stage, done, total)`.
    """
    model = judge.trial.model
    if model.images_have_grids or any(len(judge.lost(setting)) >= FEWEST_CONTROLLED for setting in judge.settings):
        return None
    texts = list(zip(judge.judged.texts, judge.alone, strict=True))
    refused = [text.prompt for text, alone in texts if text.kind == "harmful" and alone.refused]
    answered = [text.prompt for text, alone in texts if text.kind == "harmless" and not alone.refused]
    if len(refused) < FEWEST_CONTROLLED:
        return None
    try:
        search = worst_images(
            model,
            refused[:_SEARCHED],
            harmless=answered[:_SEARCHED],
            calls=_CALLS,
            batch_size=4 * _SEARCHED,
            report_count=lambda done, total: report_progress("searching a worst image", done, total),
        )
    except GuardError:  # no image of one size, or no refusal in so few tokens: one setting less
        return None
    rows = judge.judged.settings[0].texts
    image = search.images[0].features
    return Setting(NAME, rows, tuple(Request(texts[at][0].prompt, image) for at in rows))
