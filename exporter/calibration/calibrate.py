"""The calibrator: chooses layers, rank, readout, threshold, target, origin and strength from labelled prompts, under a budget.

1. One tapped pass over the calibration prompts (and their text-only versions) reads every layer's states. The tokens of the
   unguarded model's answers to harmless prompts are read too, because the gate decides at each of them.
2. A candidate's numbers are fitted to these states (`fitting.py`), always without the prompts that test it.
3. Candidates run in order of promise (`candidates.py`) in one graph whose numbers are inputs (`trials.py`). The winner keeps
   over-refusal within the budget in every setting and refuses no fewer harmful prompts than the unguarded model in any. Among
   these it refuses the most in its worst setting, then has the fewest layers, then most often repeats word for word what the
   unguarded model answers to the same prompt as text.
4. The winner is fitted to all prompts and runs all of them. Fitted without the held-out prompts, it runs those, together with
   two controls (`controls.py`) that must not reach its result.

The unguarded model runs first: a guard that refuses no more than it does is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...graphs.anatomy import DecoderAnatomy
from ...graphs.directions import Directions
from ...graphs.errors import GuardError
from ...graphs.modes import guard_mode
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.spec import GuardSpec
from ...runtime.vlm import VisionLanguageModel
from ..extraction.estimators import READOUTS, require_known
from ..prompts.labelled import LabelledPrompt
from .reading import read_study
from .results import Calibration
from .search import Search
from .usable_prompts import require_both_labels, require_budget, require_layers, visible

DEFAULT_BUDGET = 0.01
ANSWER_TOKENS = 32  # of the answers that are judged


def calibrate(
    model: VisionLanguageModel,
    anatomy: DecoderAnatomy,
    directions: Directions,
    prompts: Sequence[LabelledPrompt],
    spec: GuardSpec,
    budget: float = DEFAULT_BUDGET,
    max_new_tokens: int = ANSWER_TOKENS,
    readout: str | None = None,
    report_progress: ProgressCallback = ignore_progress,
    is_late: Callable[[], bool] = lambda: False,
) -> Calibration:
    """Choose everything that `spec` leaves open.

    Args:
        model: the unguarded model.
        anatomy: of its decoder.
        directions: an SSD for each layer that may be chosen.
        prompts: calibration prompts, both labels in every setting. `supervise` uses only the harmless ones of the prompts
            whose harm is in the picture alone (`visible`).
        spec: fixed settings (mode, layers, rank, alpha, tau, positions); the others are chosen.
        budget: largest share of harmless prompts refused, in any setting.
        max_new_tokens: length of the judged answers.
        readout: readout of the gate of `restore`, a name of `estimators.READOUTS`; `None`: choose.
        report_progress: called with `(stage, done, total)`.
        is_late: whether to stop and keep the best candidate so far.

    Raises:
        DirectionMismatch: the directions lack a requested layer.
        PromptsUnusable: too few prompts, or a setting with one label only.
        GuardError: no candidate refuses more harmful prompts than the unguarded model within the budget, or a control does
            as well as the winner.
        GuardWeakens: fewer harmful prompts are refused than without the guard.
    """
    if spec.mode is not None and not guard_mode(spec.mode).is_calibrated:
        raise GuardError(
            "mode align calibrates nothing: it copies the text-only coordinates; extract directions alone, and export with "
            "--mode align"
        )
    require_budget(budget)
    if readout is not None:
        require_known("readout", readout, tuple(READOUTS))
    require_layers(spec, directions)
    require_both_labels(prompts)
    spec = replace(spec, mode=spec.mode or "restore")
    prompts = visible(prompts, spec.mode or "restore")
    study = read_study(model, anatomy, directions, prompts, spec, budget, max_new_tokens, report_progress)
    search = Search(study, model, anatomy, spec, readout, max_new_tokens, report_progress, is_late)
    best = search.run()
    return search.finish(best)
