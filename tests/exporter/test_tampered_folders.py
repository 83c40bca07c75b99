"""Attacks on what lies around a guarded decoder, one test each (`tampering_folders.py`): nothing in the manifest decides what
`verify` looks at, and nothing in the folder goes unjudged.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_guarded import edit_manifest
from tampering_folders import FOLDER_ATTACKS, SOURCE_ATTACKS, list_all, make_folders
from tiny_vlm_paths import digests

from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.errors import GuardError, ManifestMismatch
from vlmguard.runtime.guarded import GuardedVLM


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    make_folders(root)
    return root


def said(folder: Path, source: Path | None = None) -> str:
    """A refusal in one line, or the checks that do not hold; "" if nothing is caught."""
    try:
        found = verify(folder, source)
    except GuardError as error:
        assert "\n" not in str(error)
        return str(error)
    return " | ".join(f"{check.name}: {check.note}" for check in found.checks if not check.ok)


@pytest.mark.parametrize("kind", ["bare", "community", "genai", "variants"])
def test_an_untouched_folder_is_verified(folders: Path, tmp_path: Path, kind: str) -> None:
    """Also once its manifest was written anew, with files beside it that no runtime reads."""
    folder = shutil.copytree(folders / kind, tmp_path / "g")
    list_all(folder)
    (folder / "NOTES.txt").write_text("mine")
    assert not said(folder) and not said(folder, folders / "sources" / kind)


@pytest.mark.parametrize("name", FOLDER_ATTACKS)
def test_caught_from_the_files_alone(folders: Path, tmp_path: Path, name: str) -> None:
    kind, attack, expected = FOLDER_ATTACKS[name]
    folder = shutil.copytree(folders / kind, tmp_path / "g")
    before = digests(folder)
    attack(folder)
    assert digests(folder) != before or any(path.is_symlink() for path in folder.rglob("*"))
    assert expected in said(folder)
    assert said(folder, folders / "sources" / kind)


@pytest.mark.parametrize("name", SOURCE_ATTACKS)
def test_caught_beside_the_source(folders: Path, tmp_path: Path, name: str) -> None:
    kind, attack, expected = SOURCE_ATTACKS[name]
    folder = shutil.copytree(folders / kind, tmp_path / "g")
    attack(folder)
    assert not said(folder)
    assert expected in said(folder, folders / "sources" / kind)


@pytest.mark.parametrize(
    "name",
    [
        "an unguarded decoder in a second layout",
        "a genai config that names an unguarded decoder",
        "a pipeline of graphs",
    ],
)
def test_the_runtime_refuses_a_second_decoder_too(folders: Path, tmp_path: Path, name: str) -> None:
    kind, attack, expected = FOLDER_ATTACKS[name]
    folder = shutil.copytree(folders / kind, tmp_path / "g")
    attack(folder)
    edit_manifest(folder, lambda content: content.update(proved="full"))
    with pytest.raises(ManifestMismatch) as raised:
        GuardedVLM.open(folder)
    assert expected in str(raised.value)
