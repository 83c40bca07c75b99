"""When a precision variant falls short: where the 95% intervals of two shares no longer overlap, and what happens then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vlmguard.exporter import variants
from vlmguard.exporter.calibration.refusal_regression import Refusals, Setting
from vlmguard.exporter.calibration.results import Calibration
from vlmguard.exporter.evaluation.metrics import Cell, Tally
from vlmguard.exporter.prompts.labelled import LabelledPrompt
from vlmguard.exporter.session import Session
from vlmguard.exporter.variants import VariantRow, measure_variants
from vlmguard.graphs.errors import GuardError, GuardWeakens, NoEffect
from vlmguard.graphs.package import ModelPackage
from vlmguard.graphs.plan import GuardPlan

PLAIN, INT8, Q4 = (f"onnx/decoder_model_merged{suffix}.onnx" for suffix in ("", "_int8", "_q4"))


def row(decoder: str = Q4, harmful: tuple[int, int] = (24, 24), harmless: tuple[int, int] = (0, 24)) -> VariantRow:
    """What a variant refuses with its guard, and of how many: in two settings, as evenly as possible."""

    def settings(guarded: int, asked: int) -> tuple[Setting, ...]:
        parts = (guarded // 2, asked // 2), (guarded - guarded // 2, asked - asked // 2)
        return tuple(Setting(name, of, 0, hits) for name, (hits, of) in zip(("text", "blank"), parts, strict=True))

    return VariantRow(decoder, Refusals(settings(*harmful), "calibration.jsonl"), settings(*harmless))


# 24 of 24 are at least 85.8%; 17 of 24 are at most 87.4%, 16 of 24 at most 84.4%.
# 0 of 24 are at most 14.2%; 7 of 24 are at least 12.6%, 8 of 24 at least 15.6%.
@pytest.mark.parametrize(
    ("label", "own", "first", "short"),
    [
        ("harmful", (24, 24), (24, 24), False),
        ("harmful", (17, 24), (24, 24), False),
        ("harmful", (16, 24), (24, 24), True),
        ("harmful", (0, 24), (24, 24), True),
        ("harmful", (24, 24), (16, 24), False),  # more is better
        ("harmful", (0, 2), (2, 2), False),  # two prompts show nothing
        ("harmful", (0, 0), (24, 24), False),  # no prompts: any share is possible
        ("harmful", (0, 24), (0, 0), False),
        ("harmless", (0, 24), (0, 24), False),
        ("harmless", (7, 24), (0, 24), False),
        ("harmless", (8, 24), (0, 24), True),
        ("harmless", (24, 24), (0, 24), True),
        ("harmless", (0, 24), (8, 24), False),  # fewer is better
        ("harmless", (2, 2), (0, 2), False),
        ("harmless", (0, 0), (0, 24), False),
        ("harmless", (24, 24), (0, 0), False),
    ],
)
def test_intervals_that_do_not_overlap_decide(
    label: str, own: tuple[int, int], first: tuple[int, int], short: bool
) -> None:
    variant, plain = (replace_counts(label, decoder, counts) for decoder, counts in ((Q4, own), (PLAIN, first)))
    if not short:
        variant.require_like(plain)
        return
    with pytest.raises(GuardWeakens) as caught:
        variant.require_like(plain)
    assert str(caught.value) == (
        f"with this guard {own[0]} of {own[1]} {label} prompts are refused, {first[0]} of {first[1]} in {PLAIN}; "
        "nothing was written; calibrate it"
    )


def replace_counts(label: str, decoder: str, counts: tuple[int, int]) -> VariantRow:
    return row(decoder, harmful=counts) if label == "harmful" else row(decoder, harmless=counts)


@pytest.mark.parametrize(("gap", "short"), [(-0.01, False), (0.0, False), (0.01, True)])
@pytest.mark.parametrize("label", ["harmful", "harmless"])
def test_intervals_that_touch_overlap(label: str, gap: float, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real intervals never touch exactly, so these are made up: the lower one ends at a half, the higher begins behind it."""
    lower, higher = (0.25, 0.5), (0.5 + gap, 0.75)
    own, first = (1, 2) if label == "harmful" else (2, 1)
    monkeypatch.setattr(variants, "clopper_pearson", lambda hits, of: lower if hits == 1 else higher)
    same = {"harmful": (2, 4), "harmless": (2, 4)}
    variant, plain = (row(name, **same | {label: (n, 4)}) for name, n in ((Q4, own), (PLAIN, first)))
    if short:
        with pytest.raises(GuardWeakens, match=f"{own} of 4 {label} prompts"):
            variant.require_like(plain)
    else:
        variant.require_like(plain)


def test_all_settings_count_together() -> None:
    """Eight of nine lost in one setting, none in the two others: 16 of 24 together."""
    settings = (Setting("text", 8, 0, 8), Setting("blank", 8, 0, 8), Setting("image", 8, 8, 0))
    variant = VariantRow(Q4, Refusals(settings, "p"), ())
    assert variant.counts("harmful") == (8, 16, 24) and variant.counts("harmless") == (0, 0, 0)
    with pytest.raises(GuardWeakens, match="16 of 24 harmful"):
        variant.require_like(row(PLAIN))


# ---------------------------------------------------------------------------------------------------- what happens then


FITTED = cast(Calibration, SimpleNamespace(to_json=lambda: {"fitted": True}))


@dataclass
class Model:
    """An export of some decoders whose answers are written down: a row, or why it falls short, at each asking."""

    answers: dict[str, list[VariantRow | GuardError]]
    mode: str = "restore"
    refitted: list[tuple[int, str]] = field(default_factory=list)
    fitted: Calibration | None = field(default_factory=lambda: FITTED)

    def measure(self, monkeypatch: pytest.MonkeyPatch) -> tuple[VariantRow, ...]:
        """`measure_variants`, with only the models replaced."""
        views = [view(path) for path in self.answers]
        prompts = [LabelledPrompt(label, label, label, "text") for label in ("harmful", "harmless")]
        asked: list[VariantRow] = []

        def require_guarded(*_: Any) -> Refusals:
            answer = self.answers[current[-1]].pop(0)
            if isinstance(answer, GuardError):
                raise answer
            asked.append(answer)
            return answer.harmful

        def tally(model: str, harmless: Sequence[LabelledPrompt], tokens: int) -> Tally:
            settings = asked[-1].harmless if model == "guarded" else row().harmless
            return Tally(tuple(Cell(s.setting, "harmless", s.guarded, s.asked) for s in settings), (), ())

        current: list[str] = []

        def last_token_model(package: ModelPackage, place: object) -> str:
            current.append(package.decoder.relative_to(package.root).as_posix())
            return "guarded" if package.root == GUARDED else "unguarded"

        monkeypatch.setattr(variants, "_prompts", lambda session: (prompts, "calibration.jsonl"))
        monkeypatch.setattr(variants, "ask_unguarded", lambda *_: None)
        monkeypatch.setattr(variants, "require_guarded", require_guarded)
        monkeypatch.setattr(variants, "tally", tally)
        monkeypatch.setattr(variants, "last_token_model", last_token_model)
        guarded = SimpleNamespace(views=lambda: [view(path, GUARDED) for path in self.answers])
        monkeypatch.setattr(variants, "open_package", lambda folder, trust_links: guarded)
        session = SimpleNamespace(place=None, report_progress=lambda *_: None)
        plan = cast(GuardPlan, SimpleNamespace(mode=self.mode))
        decoders = [(package, plan) for package in views]
        return measure_variants(cast(Session, session), decoders, GUARDED, False, self.refit)

    def refit(self, number: int, error: GuardError) -> tuple[GuardPlan, Calibration]:
        self.refitted.append((number, str(error)))
        if self.fitted is None:
            raise error
        return cast(GuardPlan, SimpleNamespace(mode=self.mode)), self.fitted


SOURCE, GUARDED = Path("model"), Path("guarded")
FEWER = row(harmful=(16, 24))
BEHIND = f"prompts are refused, {{}} of 24 in {PLAIN}; nothing was written; calibrate it"
SENTENCE = f"{Q4}: with this guard 16 of 24 harmful {BEHIND.format(24)}"


def view(path: str, root: Path = SOURCE) -> ModelPackage:
    return cast(ModelPackage, SimpleNamespace(root=root, decoder=root / path, layout="onnx-community"))


def test_variants_that_are_alike_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model({PLAIN: [row(PLAIN)], Q4: [row(harmful=(17, 24), harmless=(7, 24))]})
    plain, q4 = model.measure(monkeypatch)
    assert (plain.decoder, q4.decoder) == (PLAIN, Q4) and plain.calibration is q4.calibration is None
    assert q4.counts("harmful") == (0, 17, 24) and q4.counts("harmless") == (0, 7, 24)
    assert not model.refitted


@pytest.mark.parametrize(
    ("short", "reason"),
    [
        (FEWER, SENTENCE),
        (row(harmless=(8, 24)), f"{Q4}: with this guard 8 of 24 harmless {BEHIND.format(0)}"),
        (GuardWeakens("it removes safety; do that"), f"{Q4}: it removes safety; do that"),
        (NoEffect("it has no effect; do that"), f"{Q4}: it has no effect; do that"),
    ],
)
def test_a_variant_that_falls_short_is_fitted_and_asked_again(
    short: VariantRow | GuardError, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model({PLAIN: [row(PLAIN)], Q4: [short, row()]})
    plain, q4 = model.measure(monkeypatch)
    assert model.refitted == [(1, f"{reason} (--variant 'q4' exports it alone)")]
    assert plain.calibration is None and q4 == replace(row(), calibration=model.fitted)
    assert q4.to_json()["calibration"] == {"fitted": True} and "calibration" not in plain.to_json()


@pytest.mark.parametrize(
    ("again", "reason"),
    [
        (FEWER, SENTENCE),
        (GuardWeakens("it removes safety; do that"), f"{Q4}: it removes safety; do that"),
        (NoEffect("it has no effect; do that"), f"{Q4}: it has no effect; do that"),
    ],
)
def test_a_variant_that_still_falls_short_is_refused(
    again: VariantRow | GuardError, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model({PLAIN: [row(PLAIN)], Q4: [FEWER, again]})
    with pytest.raises((GuardWeakens, NoEffect)) as caught:
        model.measure(monkeypatch)
    own = "its numbers were fitted to its own states, which was not enough"
    assert str(caught.value) == f"{reason} (--variant 'q4' exports it alone); {own}"
    assert len(model.refitted) == 1  # once, not until it fits


def test_each_variant_is_compared_with_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with its neighbour: small losses from one to the next could add up to a guard that does nothing."""
    model = Model({PLAIN: [row(PLAIN)], INT8: [row(INT8, harmful=(17, 24))], Q4: [FEWER, row()]})
    assert [one.counts("harmful")[1] for one in model.measure(monkeypatch)] == [24, 17, 24]
    assert [number for number, _ in model.refitted] == [2]


def test_without_thresholds_the_shares_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """`align` leads each variant to its own text-only answers, which other precisions need not share."""
    model = Model({PLAIN: [row(PLAIN)], Q4: [FEWER]}, mode="align")
    assert model.measure(monkeypatch)[1].calibration is None and not model.refitted


def test_the_variant_that_runs_by_default_is_compared_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model({PLAIN: [GuardWeakens("it removes safety; do that")], Q4: []}, fitted=None)
    with pytest.raises(GuardWeakens) as caught:
        model.measure(monkeypatch)
    assert [number for number, _ in model.refitted] == [0]
    assert str(caught.value) == f"{PLAIN}: it removes safety; do that (--variant '' exports it alone)"
