"""Precision variants of one decoder: each one answers the same prompts, unguarded and guarded.

Thresholds are calibrated on the variant that runs by default. Another precision computes other states, so a guard that works in
float32 may open too often or too rarely in int4. So every variant is measured, and one that the guard does not protect is an
error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graphs.errors import GuardError, GuardWeakens, NoEffect
from ..graphs.layouts import open_package, variant_name
from ..graphs.package import ModelPackage
from ..graphs.plan import GuardPlan
from ..graphs.progress import ignore_progress
from ..runtime.vlm import VisionLanguageModel
from .calibration.effect import BUILTIN_TOKENS, Sample, Unguarded, ask_unguarded, builtin_pairs
from .calibration.refusal_regression import Refusals, Setting
from .effect_check import prompts_in, require_guarded, why_not_run
from .evaluation.evaluate import tally
from .last_token_model import last_token_model
from .prompts.labelled import BUILTIN, LabelledPrompt, prompts_from_anchors
from .prompts.thinning import by_setting_and_label
from .session import Session

_OF_EACH_KIND = 8  # prompts of each setting and label; every variant answers them twice


@dataclass(frozen=True)
class VariantRow:
    """What one variant refuses.

    Attributes:
        decoder: path of the graph, relative to the folder.
        harmful: harmful prompts per setting, refused without and with the guard, and on how many the guard has an effect.
        harmless: harmless prompts per setting, refused without and with the guard.
    """

    decoder: str
    harmful: Refusals
    harmless: tuple[Setting, ...]

    def counts(self, label: str) -> tuple[int, int, int]:
        """Refused without the guard, refused with it, and the number of prompts, over all settings."""
        settings = self.harmful.settings if label == "harmful" else self.harmless
        return sum(s.unguarded for s in settings), sum(s.guarded for s in settings), sum(s.asked for s in settings)

    def to_json(self) -> dict[str, Any]:
        return {"harmful": self.harmful.to_json(), "harmless": [dict(vars(setting)) for setting in self.harmless]}


def measure_variants(
    session: Session, decoders: Sequence[tuple[ModelPackage, GuardPlan]], folder: Path, allow_no_effect: bool
) -> tuple[VariantRow, ...]:
    """One row per precision variant; empty where there is only one, or the model cannot be asked.

    Args:
        session: of the unguarded model; all decoders are opened in its place, one at a time.
        decoders: the unguarded model seen from each of its decoder graphs, and the plan of its guard.
        folder: with the guarded graphs.
        allow_no_effect: accept a variant in which the guard changes nothing.

    Raises:
        GuardWeakens: in some variant and setting the guarded decoder refuses fewer harmful prompts than the unguarded one.
        NoEffect: in some variant the guard changes nothing, and that is not allowed.
    """
    if len(decoders) < 2 or not _are_variants([view for view, _ in decoders]):
        return ()
    prompts, source = _prompts(session)
    harmful, harmless = ([prompt for prompt in prompts if prompt.label == label] for label in ("harmful", "harmless"))
    if not harmful:
        return ()
    guarded_views = {view.decoder.name: view for view in open_package(folder, trust_links=True).views()}
    rows = []
    for number, (view, plan) in enumerate(decoders):
        session.report_progress("asking the variants", number, len(decoders))
        path = view.decoder.relative_to(view.root).as_posix()
        sample = Sample(tuple(harmful), (), (), source, BUILTIN_TOKENS)
        model = last_token_model(view, session.place)
        unguarded, before = ask_unguarded(model, sample, ignore_progress), tally(model, harmless, BUILTIN_TOKENS)
        model = last_token_model(guarded_views[view.decoder.name], session.place)
        refusals = _refusals(path, unguarded, model, plan, allow_no_effect)
        after = tally(model, harmless, BUILTIN_TOKENS)
        pairs = zip(before.cells, after.cells, strict=True)
        rows.append(
            VariantRow(path, refusals, tuple(Setting(b.setting, b.asked, b.refused, a.refused) for b, a in pairs))
        )
    session.report_progress("asking the variants", len(decoders), len(decoders))
    return tuple(rows)


def _refusals(
    path: str, unguarded: Unguarded, guarded: VisionLanguageModel, plan: GuardPlan, allow_no_effect: bool
) -> Refusals:
    """The refusals of a variant that the guard protects; the error of one that it does not names the file."""
    try:
        return require_guarded(unguarded, lambda: guarded, plan, allow_no_effect, ignore_progress)
    except (GuardWeakens, NoEffect) as error:
        raise type(error)(f"{path}: {error}, with this variant alone (--variant)") from None


def _are_variants(views: Sequence[ModelPackage]) -> bool:
    """Whether graphs differ in precision alone: of an onnx-community folder, with one name before the precision."""
    names = {view.decoder.stem.removesuffix(f"_{variant_name(view.decoder)}") for view in views}
    return {view.layout for view in views} == {"onnx-community"} and len(names) == 1


def _prompts(session: Session) -> tuple[list[LabelledPrompt], str]:
    """A few prompts of each setting and label: those that come with the model, else built-in held-out anchors.

    None where the model cannot be asked; the plan's notes have the reason.
    """
    path = session.find_prompts()
    if why_not_run(session.package):
        return [], ""
    try:
        model = session.model()
        if path is None:
            prompts, source = prompts_from_anchors(builtin_pairs(model), model.sees), f"{BUILTIN}:calibration"
        else:
            prompts, source = prompts_in(path, model.sees), path.name
    except GuardError:
        if path is not None:  # prompts that were put there to be asked
            raise
        return [], ""
    usable = [prompt for prompt in prompts if model.sees or prompt.setting == "text"]
    return by_setting_and_label(usable, _OF_EACH_KIND, ("harmful", "harmless")), source
