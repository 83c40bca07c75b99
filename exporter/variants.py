"""Precision variants of one decoder: each one answers the same prompts, unguarded and guarded.

Thresholds are calibrated on the variant that runs by default. Another precision computes other states, so a guard that works in
float32 may open too often or too rarely in int4. So every variant is measured. One that **falls short** is fitted to its own
states and asked again; one that still falls short is an error. A variant falls short if

- the guard changes nothing in it, or removes refusals, or
- its guard has thresholds, and it refuses clearly fewer harmful or more harmless prompts than the variant that runs by default:
  the 95% intervals of the two shares do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..graphs.errors import GuardError, GuardWeakens, NoEffect
from ..graphs.layouts import open_package, variant_name
from ..graphs.modes import guard_mode
from ..graphs.package import ModelPackage
from ..graphs.plan import GuardPlan
from ..graphs.progress import ignore_progress
from .calibration.effect import BUILTIN_TOKENS, Sample, Unguarded, ask_unguarded, builtin_pairs
from .calibration.refusal_regression import Refusals, Setting
from .calibration.results import Calibration
from .effect_check import prompts_in, require_guarded, why_not_run
from .evaluation.evaluate import tally
from .evaluation.intervals import clopper_pearson
from .evaluation.metrics import Tally
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
        calibration: how its numbers were fitted to its own states; `None`: they are those of the first variant.
    """

    decoder: str
    harmful: Refusals
    harmless: tuple[Setting, ...]
    calibration: Calibration | None = None

    def counts(self, label: str) -> tuple[int, int, int]:
        """Refused without the guard, refused with it, and the number of prompts, over all settings."""
        settings = self.harmful.settings if label == "harmful" else self.harmless
        return sum(s.unguarded for s in settings), sum(s.guarded for s in settings), sum(s.asked for s in settings)

    def to_json(self) -> dict[str, Any]:
        calibration = {"calibration": self.calibration.to_json()} if self.calibration is not None else {}
        harmless = [dict(vars(setting)) for setting in self.harmless]
        return {"harmful": self.harmful.to_json(), "harmless": harmless, **calibration}

    def require_like(self, first: VariantRow) -> None:
        """Require refusals that do not clearly differ from those of the first variant.

        Raises:
            GuardWeakens: clearly fewer harmful or more harmless prompts are refused.
        """
        for label in ("harmful", "harmless"):
            (_, own, asked), (_, theirs, of) = self.counts(label), first.counts(label)
            (low, high), (least, most) = clopper_pearson(own, asked), clopper_pearson(theirs, of)
            if high < least if label == "harmful" else low > most:
                raise GuardWeakens(
                    f"with this guard {own} of {asked} {label} prompts are refused, {theirs} of {of} in {first.decoder}; "
                    "nothing was written; calibrate it"
                )


# (number of the decoder, why it falls short) -> the plan of the guard that was fitted to its states, and how it was fitted
Refit = Callable[[int, GuardError], tuple[GuardPlan, Calibration]]


def measure_variants(
    session: Session,
    decoders: Sequence[tuple[ModelPackage, GuardPlan]],
    folder: Path,
    allow_no_effect: bool,
    refit: Refit,
) -> tuple[VariantRow, ...]:
    """One row per precision variant; empty where there is only one, or the model cannot be asked.

    Args:
        session: of the unguarded model; all decoders are opened in its place, one at a time.
        decoders: the unguarded model seen from each of its decoder graphs, and the plan of its guard.
        folder: with the guarded graphs.
        allow_no_effect: accept a variant in which the guard changes nothing.
        refit: writes the guard of a variant that falls short again, fitted to the variant's own states; raises the reason if
            it cannot.

    Raises:
        GuardWeakens: in some variant the guarded decoder refuses fewer harmful prompts than the unguarded one, or clearly other
            prompts than the first variant.
        NoEffect: in some variant the guard changes nothing, and that is not allowed.
    """
    if len(decoders) < 2 or not _are_variants([view for view, _ in decoders]):
        return ()
    prompts, source = _prompts(session)
    harmful, harmless = ([prompt for prompt in prompts if prompt.label == label] for label in ("harmful", "harmless"))
    if not harmful:
        return ()
    sample = Sample(tuple(harmful), (), (), source, BUILTIN_TOKENS)
    guarded_views = {view.decoder.name: view for view in open_package(folder, trust_links=True).views()}
    rows: list[VariantRow] = []
    for number, (view, plan) in enumerate(decoders):
        session.report_progress("asking the variants", number, len(decoders))
        model = last_token_model(view, session.place)
        unguarded, before = ask_unguarded(model, sample, ignore_progress), tally(model, harmless, BUILTIN_TOKENS)
        answers = _Answers(guarded_views[view.decoder.name], unguarded, harmless, before)
        first = rows[0] if rows else None
        try:
            rows.append(answers.row(session, plan, first, allow_no_effect))
        except (GuardWeakens, NoEffect) as error:
            plan, calibration = refit(number, error)
            try:
                rows.append(replace(answers.row(session, plan, first, allow_no_effect), calibration=calibration))
            except (GuardWeakens, NoEffect) as still:
                raise type(still)(f"{still}; its numbers were fitted to its own states, which was not enough") from None
    session.report_progress("asking the variants", len(decoders), len(decoders))
    return tuple(rows)


@dataclass(frozen=True)
class _Answers:
    """What one unguarded variant answers.

    Attributes:
        guarded: the guarded model seen from this variant.
        unguarded: the answers to the harmful prompts.
        harmless: the harmless prompts.
        before: the answers to them.
    """

    guarded: ModelPackage
    unguarded: Unguarded
    harmless: Sequence[LabelledPrompt]
    before: Tally

    def row(self, session: Session, plan: GuardPlan, first: VariantRow | None, allow_no_effect: bool) -> VariantRow:
        """Ask the guarded variant too.

        Args:
            session: the decoder is opened in its place.
            plan: of the guard.
            first: the row of the variant that runs by default, to compare with.
            allow_no_effect: as for `measure_variants`.

        Raises:
            GuardWeakens, NoEffect: it falls short; the message names the file.
        """
        path = self.guarded.decoder.relative_to(self.guarded.root).as_posix()
        model = last_token_model(self.guarded, session.place)
        try:
            refusals = require_guarded(self.unguarded, lambda: model, plan, allow_no_effect, ignore_progress)
            cells = zip(self.before.cells, tally(model, self.harmless, BUILTIN_TOKENS).cells, strict=True)
            row = VariantRow(path, refusals, tuple(Setting(b.setting, b.asked, b.refused, a.refused) for b, a in cells))
            if first is not None and guard_mode(plan.mode).has_threshold:
                row.require_like(first)
        except (GuardWeakens, NoEffect) as error:
            alone = f"--variant '{variant_name(self.guarded.decoder)}' exports it alone"
            raise type(error)(f"{path}: {error} ({alone})") from None
        return row


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
