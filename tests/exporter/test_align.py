"""Mode `align` from end to end: exported without a calibration, proved, verified, recorded, and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_vlm_paths import CALIBRATION, SOURCE, Guarded

import vlmguard
from vlmguard.exporter.calibration.align_judge import Counts, Figures, PictureCounts, keeps_budget
from vlmguard.exporter.calibration.guard_config import CONFIG_NAME, read_config
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.spec import GuardSpec

pytest_plugins = ("tiny_vlm_fixtures",)


def test_the_export_needs_no_calibration_and_says_what_it_took(guarded: Guarded) -> None:
    manifest = read_manifest(guarded("align"))
    plan = manifest.plan
    assert (plan["mode"], plan["positions"], plan["layers"]) == ("align", "prompt", [2, 3, 4])
    assert [site["rank"] for site in plan["sites"]] == [8] * 3
    assert "directions extracted from anchors.jsonl; nothing is calibrated in mode align" in plan["notes"]
    which = "the later two thirds of the decoder without its last layer"
    assert f"layers 2, 3, 4: {which}; nothing is calibrated in mode align" in plan["notes"]


def test_the_folder_verifies_and_its_guard_toml_is_the_guard(guarded: Guarded) -> None:
    folder = guarded("align")
    assert all(check.ok for check in verify(folder, source=SOURCE).checks)
    spec = read_config(folder / CONFIG_NAME).spec
    assert (spec.mode, spec.layers, spec.rank, spec.positions) == ("align", (2, 3, 4), 8, "prompt")
    assert read_directions(folder / "directions.safetensors").mode == "align"


def test_harmful_prompts_with_images_are_refused_as_their_texts_are(guarded: Guarded) -> None:
    refusals = read_manifest(guarded("align")).refusals
    assert refusals is not None
    counts = {one["setting"]: (one["unguarded"], one["guarded"], one["asked"]) for one in refusals["settings"]}
    assert counts == {"text": (16, 16, 16), "blank": (0, 16, 16), "image": (0, 16, 16)}


@pytest.mark.parametrize(
    ("options", "idle"),
    [({"calibration": CALIBRATION}, "--calibration"), ({"readout": "lda"}, "--readout"), ({"budget": 0.5}, "--budget")],
)
def test_options_of_a_calibration_are_refused(tmp_path: Path, options: dict[str, Any], idle: str) -> None:
    with pytest.raises(GuardError) as refusal:
        vlmguard.export(SOURCE, tmp_path / "out", spec=GuardSpec(mode="align"), **options)
    assert str(refusal.value) == f"mode align calibrates nothing, so {idle} has no effect; leave it out"
    assert not list(tmp_path.iterdir())


def test_given_directions_are_taken_as_they_are(guarded: Guarded, tmp_path: Path) -> None:
    directions = guarded("align") / "directions.safetensors"
    made = vlmguard.export(
        SOURCE, tmp_path / "out", spec=GuardSpec(mode="align", rank=2), directions=directions, dry_run=True
    )
    assert (made.plan.layers, made.plan.guards[0].rank) == ((2, 3, 4), 2)
    with pytest.raises(GuardError) as refusal:
        vlmguard.export(
            SOURCE,
            tmp_path / "out",
            spec=GuardSpec(mode="align"),
            directions=directions,
            anchors="builtin",
            dry_run=True,
        )
    assert str(refusal.value) == (
        f"{directions}: mode align copies along these directions as they are, so --anchors has no effect; leave one of the two "
        "out"
    )


def test_figures_name_refused_questions_about_the_picture() -> None:
    """They count against the budget as harmless prompts do, so a candidate that they rule out says so."""
    harmful, harmless = Counts(20, 20, 0, 20, 20, 0, 20), Counts(12, 0, 0, 0, 0, 0, 0)
    said = "blank: 20 of 20 harmful prompts refused (as text 20, unguarded 0), 0 of 12 harmless refused beyond text"
    assert str(Figures("blank", harmful, harmless, PictureCounts(4, 0, 1))) == said
    refused = Figures("blank", harmful, harmless, PictureCounts(4, 4, 4))
    assert str(refused) == f"{said}, 4 of 4 questions about the picture" and not keeps_budget([refused], 0.01)
