"""`verify` compares `guard.toml` with the graph beside it: every value that may be edited there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hand_graphs import directions
from random_directions import write_directions
from small_guarded import small_model

import vlmguard
from vlmguard.exporter.calibration.guard_config import to_toml
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.errors import GuardError, ManifestMismatch
from vlmguard.graphs.spec import GuardSpec

SPECS = {
    "restore": GuardSpec(mode="restore", layers=(0, 1), rank=2),
    "supervise": GuardSpec(mode="supervise", layers=(0, 1), rank=2, alpha=0.5),
    "combined": GuardSpec(mode="combined", layers=(0, 1), rank=2),
    "project": GuardSpec(mode="project", layers=(0, 1), rank=2),
}


def guarded_by_config(folder: Path, mode: str) -> Path:
    """A small decoder guarded from a `guard.toml`, which then lies in the folder too."""
    model = small_model(folder / "model")
    found = write_directions(folder / "d.safetensors", directions((0, 1)))
    text = to_toml(SPECS[mode], found.name, vlmguard.graphs.directions.read_directions(found))
    (folder / "guard.toml").write_text(text, encoding="utf-8")
    return vlmguard.export(model, folder / "out", config=folder / "guard.toml", proof="structure").out


def edit(folder: Path, pattern: str, replacement: str) -> Path:
    path = folder / "guard.toml"
    text, count = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
    assert count == 1
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("mode", list(SPECS))
def test_an_untouched_config_agrees(mode: str, tmp_path: Path) -> None:
    out = guarded_by_config(tmp_path, mode)
    assert (out / "guard.toml").is_file() and verify(out).ok


@pytest.mark.parametrize(
    ("mode", "pattern", "replacement", "said"),
    [
        ("restore", r"^threshold = .*", "threshold = 100", r"layers\.0\.threshold is 100, the graph has [-\d.]+"),
        ("restore", r"^target = .*", "target = [1, 2]", r"layers\.0\.target is \[1, 2\], the graph has \[.*\]"),
        ("restore", r"^layers = .*", "layers = [1]", r"guard\.layers is \[1\], the graph has \[0, 1\]"),
        ("restore", r'^mode = "restore"', 'mode = "project"', r"guard\.mode is project, the graph has restore"),
        ("restore", r"^rank = 2", 'rank = 2\npositions = "all"', r"guard\.positions is all, the graph has last"),
        ("restore", r"^rank = 2", "rank = 2\nknobs = true", r"guard\.knobs is true, the graph has false"),
        ("restore", r"^rank = 2", "rank = 2\ntelemetry = true", r"guard\.telemetry is true, the graph has false"),
        ("restore", r"^rank = 2", 'rank = 2\ngate = "prompt"', r"guard\.gate is prompt, the graph has token"),
        ("supervise", r"^alpha = .*", "alpha = 2.0", r"guard\.alpha is 2, the graph has 0\.5"),
        ("supervise", r"^origin = .*", "origin = [9, 9]", r"layers\.0\.origin is \[9, 9\], the graph has \[.*\]"),
        (
            "combined",
            r"^text_threshold = .*",
            "text_threshold = 7",
            r"layers\.0\.text_threshold is 7, the graph has [-\d.]+",
        ),
        ("project", r"^rank = 2", "rank = 1", r"guard\.rank is 1, the graph has 2"),
        ("project", r"^rank = 2", 'rank = 2\nlowering = "dense"', r"guard\.lowering is dense, the graph has lowrank"),
    ],
)
def test_an_edited_value_is_named_with_what_the_graph_has(
    mode: str, pattern: str, replacement: str, said: str, tmp_path: Path
) -> None:
    out = guarded_by_config(tmp_path, mode)
    path = edit(out, pattern, replacement)
    with pytest.raises(ManifestMismatch) as caught:
        verify(out)
    again = f"; export again with --config {path}, or correct the file"
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith(again)
    assert re.fullmatch(said, str(caught.value).removeprefix(f"{path}: ").removesuffix(again))


def test_a_wish_that_the_graph_cannot_have_is_named(tmp_path: Path) -> None:
    out = guarded_by_config(tmp_path, "restore")
    path = edit(out, r"^rank = .*", "rank = 5")
    with pytest.raises(ManifestMismatch) as caught:
        verify(out)
    assert str(caught.value).startswith(f"{path}: is not the guard in the graph (rank 5 is more than the ")


def test_a_config_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    out = guarded_by_config(tmp_path, "restore")
    (out / "guard.toml").write_text("threshold = [1,\n")
    with pytest.raises(GuardError, match=r"guard\.toml: is not TOML \(Invalid value \(at end of document\)\)"):
        verify(out)


def test_a_folder_without_a_config_is_verified(tmp_path: Path) -> None:
    out = guarded_by_config(tmp_path, "restore")
    (out / "guard.toml").unlink()
    assert verify(out).ok
