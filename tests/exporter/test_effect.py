"""A guard that changes nothing is not written, unless that is asked for; what was measured is in the manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_directions import random_directions, write_directions
from tiny_vlm_paths import PROMPTS, SOURCE, Guarded

from vlmguard.exporter.calibration.effect import BUILTIN_TOKENS, builtin_sample, has_effect, require_effect, sample_of
from vlmguard.exporter.calibration.refusal_regression import Refusals, Setting
from vlmguard.exporter.effect_check import EffectBaseline, ask_before
from vlmguard.exporter.evaluation.logprobs import Said
from vlmguard.exporter.export_result import ExportResult
from vlmguard.exporter.opened_decoder import dissect_decoder
from vlmguard.exporter.pipeline import export
from vlmguard.exporter.prompts.labelled import LabelledPrompt
from vlmguard.exporter.proof.verify import verify
from vlmguard.exporter.session import Session
from vlmguard.exporter.sources import Source
from vlmguard.graphs.directions import Directions, read_directions
from vlmguard.graphs.errors import GuardWeakens, NoEffect
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.spec import GuardSpec
from vlmguard.runtime.vlm import VisionLanguageModel

pytest_plugins = ("tiny_vlm_fixtures",)

CHECK = "an effect on harmful prompts was counted at export, or none was allowed"
EXACTLY = (
    "the guarded model answers them exactly as the unguarded one; nothing was written; check thresholds, targets, strength and "
    "directions, calibrate with --anchors, or export it nevertheless with --allow-no-effect"
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny VLM with no prompts beside it: the built-in anchors are asked, of which its tokenizer knows eleven pairs."""
    return shutil.copytree(SOURCE, tmp_path_factory.mktemp("alone") / "tiny")


@pytest.fixture(scope="module")
def calibrated(guarded: Guarded) -> Path:
    return guarded("restore") / "directions.safetensors"


Export = Callable[..., ExportResult]


@pytest.fixture
def exported(alone: Path, calibrated: Path, tmp_path: Path) -> Export:
    def make(found: Directions | Path = calibrated, allow_no_effect: bool = False, **spec: Any) -> ExportResult:
        file = found if isinstance(found, Path) else write_directions(tmp_path / "d.safetensors", found)
        wish = GuardSpec(**spec) if spec else None
        return export(alone, tmp_path / "out", directions=file, spec=wish, allow_no_effect=allow_no_effect)

    return make


# --------------------------------------------------------------------------------------------------------- on the tiny VLM


@pytest.fixture(scope="module")
def allowed(alone: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """A guard whose gates never open, exported nevertheless."""
    out = tmp_path_factory.mktemp("allowed") / "out"
    return export(alone, out, directions=calibrated, spec=GuardSpec("restore", tau=1e9), allow_no_effect=True)


@pytest.fixture(scope="module")
def right(alone: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export(alone, tmp_path_factory.mktemp("right") / "out", directions=calibrated)


@pytest.mark.parametrize(
    "wish",
    [{"mode": "restore", "tau": 1e9}, {"mode": "steer", "tau": -1e9, "alpha": 1e-12}],
    ids=["a threshold that no prompt reaches", "a strength that nothing feels"],
)
def test_a_guard_that_changes_nothing_is_not_written(wish: dict[str, Any], exported: Export, tmp_path: Path) -> None:
    with pytest.raises(NoEffect) as caught:
        exported(**wish)
    assert str(caught.value) == (
        f"the guard has no effect on 16 harmful prompts (builtin:calibration: text 8, blank 8): {EXACTLY}"
    )
    assert list(tmp_path.iterdir()) == []


def test_no_effect_can_be_allowed_and_is_recorded(allowed: ExportResult) -> None:
    recorded = read_manifest(allowed.out).refusals
    assert recorded is not None and allowed.refusals is not None
    assert recorded == allowed.refusals.to_json() == allowed.to_json()["refusals"]
    assert recorded["prompts"] == "builtin:calibration" and recorded["no_effect"] and recorded["allowed_no_effect"]
    assert [(s["setting"], s["asked"], s["changed"]) for s in recorded["settings"]] == [("text", 8, 0), ("blank", 8, 0)]
    (check,) = (check for check in verify(allowed.out).checks if check.name == CHECK)
    assert check.ok and check.compared == 16
    assert check.note == "no effect on 16 harmful prompts, allowed with --allow-no-effect"


def test_verify_fails_where_no_effect_was_counted_and_not_allowed(allowed: ExportResult, tmp_path: Path) -> None:
    out = shutil.copytree(allowed.out, tmp_path / "out")
    manifest = (out / "guard.json").read_text()
    (out / "guard.json").write_text(manifest.replace('"allowed_no_effect": true', '"allowed_no_effect": false'))
    result = verify(out)
    assert [(check.name, check.note) for check in result.checks if not check.ok] == [
        (CHECK, "no effect on 16 harmful prompts")
    ]


def test_the_right_guard_has_an_effect_and_its_counts(right: ExportResult) -> None:
    assert right.refusals is not None
    text, blank = right.refusals.settings
    assert blank.changed is not None and blank.changed > 0 and blank.guarded > blank.unguarded == 0
    assert text.guarded >= text.unguarded and not right.refusals.no_effect
    (check,) = (check for check in verify(right.out).checks if check.name == CHECK)
    assert check.ok and check.compared == 16 and check.note == ""


def test_in_supervise_the_text_setting_does_not_count(exported: Export) -> None:
    """There the supervisor and the model are given the same prompt, so the edit is nothing by design."""
    with pytest.raises(NoEffect, match=r"no effect on 8 harmful prompts \(builtin:calibration: blank 8\)"):
        exported(mode="supervise", tau=1e6)


def test_given_directions_with_the_wrong_sign_are_asked_the_built_in_anchors(
    exported: Export, calibrated: Path
) -> None:
    found = read_directions(calibrated)
    wrong = {number: replace(layer, ssd=-layer.ssd) for number, layer in found.layers.items()}
    with pytest.raises(GuardWeakens, match=r"setting text, without it \d \(builtin:calibration\): it removes safety"):
        exported(replace(found, layers=wrong))


# -------------------------------------------------------------------------------------------------------------------- AUC


def test_directions_without_figures_are_measured_and_warned_of(exported: Export) -> None:
    result = exported(random_directions(128, [1], rank=1, calibrated=False), mode="project")
    (found,) = result.plan.separation
    assert (found.layer, found.harmful, found.harmless, found.prompts) == (1, 15, 15, "builtin:calibration")
    assert found.at_chance and found.warning in result.plan.notes
    plan = read_manifest(result.out).plan
    assert plan["separation"] == [found.to_json()] == result.to_json()["decoders"][0]["plan"]["separation"]
    assert found.warning in plan["notes"] and verify(result.out).ok


def test_figures_of_an_extraction_are_taken_over(right: ExportResult) -> None:
    (found,) = right.plan.separation
    assert (found.auc, found.harmful, found.prompts) == (1.0, 96, "anchors.jsonl") and not found.at_chance


# --------------------------------------------------------------------------------------------------------- the definition


def said(tokens: tuple[int, ...] = (1,), first: tuple[float, ...] = (-1.0, -20.0)) -> Said:
    return Said("", tokens, np.array(first, np.float32), 0.0)


def test_an_effect_is_another_token_or_a_first_distribution_beyond_rounding() -> None:
    assert not has_effect(said(), said(), 1e-4)
    assert not has_effect(said(), said(first=(-1.001, -20.0)), 1e-4)  # 1e-3 of 20
    assert has_effect(said(), said(first=(-1.003, -20.0)), 1e-4)
    assert has_effect(said(), said(tokens=(1, 2)), 1e-4)
    ruled_out = said(first=(-1.0, -np.inf))
    assert has_effect(said(), ruled_out, 1e-4) and not has_effect(ruled_out, ruled_out, 1e-4)


def test_a_model_that_refuses_everything_can_be_changed() -> None:
    kept = Refusals((Setting("text", 5, 5, 5, changed=1), Setting("blank", 5, 5, 5, changed=0)), "p")
    assert require_effect(kept, allowed=False) is kept and kept.counted == 10
    none = Refusals((Setting("text", 5, 5, 5, changed=0), Setting("blank", 5, 5, 5, changed=0)), "p")
    with pytest.raises(NoEffect) as caught:
        require_effect(none, allowed=False)
    assert str(caught.value) == f"the guard has no effect on 10 harmful prompts (p: text 5, blank 5): {EXACTLY}"
    assert require_effect(none, allowed=True) == replace(none, allowed_no_effect=True)


def test_what_was_not_counted_proves_nothing() -> None:
    uncounted = Refusals((Setting("text", 5, 5, 5),), "calibration prompts")
    assert not uncounted.no_effect and require_effect(uncounted, allowed=False) is uncounted
    assert Refusals.from_json(uncounted.to_json()) == uncounted
    before = {"prompts": "p", "settings": [{"setting": "text", "asked": 5, "unguarded": 5, "guarded": 5}]}
    assert Refusals.from_json(before) == Refusals((Setting("text", 5, 5, 5),), "p")  # as earlier versions wrote it


# ------------------------------------------------------------------------------------------------------------- the prompts


def test_the_built_in_sample_is_small_held_back_and_harmful() -> None:
    model = VisionLanguageModel(open_package(SOURCE))
    sample = builtin_sample(model)
    assert {prompt.label for prompt in sample.prompts} == {"harmful"} and sample.tokens == BUILTIN_TOKENS == 8
    assert [prompt.setting for prompt in sample.prompts] == ["text"] * 8 + ["blank"] * 8
    assert len(sample.harmful) == len(sample.harmless) == 15


def test_a_sample_of_given_prompts_has_both_labels_as_text() -> None:
    prompts = [
        LabelledPrompt(f"{label}-{setting}", f"{label}?", label, setting)  # type: ignore[arg-type]
        for label in ("harmful", "harmless")
        for setting in ("text", "blank")
    ]
    sample = sample_of(prompts, "p.jsonl", sees=False, tokens=32)
    assert [prompt.id for prompt in sample.prompts] == ["harmful-text"]
    assert (sample.harmful, sample.harmless) == (("harmful?",), ("harmless?",))
    assert len(sample_of(prompts, "p.jsonl", sees=True, tokens=32).prompts) == 2


def test_prompts_beside_the_model_come_first(calibrated: Path, tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "models" / "tiny")
    shutil.copytree(PROMPTS, tmp_path / "models" / "tiny" / "prompts")
    wish = GuardSpec(mode="restore", tau=1e9)
    with pytest.raises(
        NoEffect, match=r"no effect on 48 harmful prompts \(calibration\.jsonl: text 16, blank 16, image 16\)"
    ):
        export(tmp_path / "models" / "tiny", tmp_path / "out", directions=calibrated, spec=wish)


# ------------------------------------------------------------------------------------------------ what cannot be asked


@pytest.fixture
def session(calibrated: Path, tmp_path: Path) -> Callable[..., Session]:
    def make(change: Callable[[Path], Any] = lambda folder: None) -> Session:
        folder = shutil.copytree(SOURCE, tmp_path / "tiny")
        change(folder)
        package = open_package(folder)
        source = Source(package, folder.name, folder.parent, folder)
        return Session(source, dissect_decoder(package, package.load_decoder()))

    return make


NOTHING = "the guard's effect on harmful prompts was not measured: "


def test_what_could_not_be_asked_is_noted_with_the_reason(session: Callable[..., Session]) -> None:
    opened = session(lambda folder: (folder / "tokenizer.json").write_text("{}"))
    baseline = ask_before(opened, "restore", runs=True)
    assert baseline.unguarded is None
    assert baseline.note.startswith(f"{NOTHING}{opened.package.root / 'tokenizer.json'}: is not")
    baseline = ask_before(opened, "restore", runs=False)
    assert baseline == EffectBaseline(None, f"{NOTHING}nothing is run without the full proof")


def test_a_supervisor_without_images_is_not_judged(session: Callable[..., Session]) -> None:
    opened = session(lambda folder: (folder / "onnx" / "vision_encoder.onnx").unlink())
    baseline = ask_before(opened, "supervise", runs=True)
    assert baseline.unguarded is not None
    assert {prompt.setting for prompt in baseline.unguarded.sample.prompts} == {"text"}
    assert baseline.note == (
        "the guard's effect was not counted: without an image, mode supervise compares each prompt with itself"
    )
    assert opened._model is None  # closed
