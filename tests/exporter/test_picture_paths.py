"""Pictures that a prompts file names: those in its folder, and those that the user allows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hugging_face_cache import into_cache
from PIL import Image

from vlmguard.exporter.prompts.labelled import read_prompts
from vlmguard.exporter.prompts.picture_paths import PICTURE_FOLDERS
from vlmguard.graphs.errors import PromptsUnusable


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture of the reader's, beside the folder with the prompts."""
    path = tmp_path / "private" / "photo.png"
    path.parent.mkdir()
    Image.new("RGB", (4, 4)).save(path)
    return path


def prompts(tmp_path: Path, image: str, name: str = "data/prompts.jsonl") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"prompt": "x", "label": "harmless", "setting": "image", "image": image}) + "\n")
    return path


def test_a_picture_elsewhere_is_refused(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(secret)
    (tmp_path / "data" / "folder").symlink_to(secret.parent)
    for image in (
        str(secret),
        "/etc/passwd",
        "/dev/zero",
        "../private/photo.png",
        "link.png",
        "folder/photo.png",
        "a\0b",
    ):
        path = prompts(tmp_path, image)
        with pytest.raises(PromptsUnusable) as raised:
            read_prompts(path)
        assert str(raised.value) == (
            f"{path}: line 1 names the image {image!r}, which is not in the folder of the file; copy it there, or allow its "
            f"folder with {PICTURE_FOLDERS}"
        )


def test_a_picture_in_the_folder_is_taken(tmp_path: Path, secret: Path) -> None:
    inside = tmp_path / "data" / "images" / "photo.png"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(secret.read_bytes())
    for image in ("images/photo.png", "./images/../images/photo.png", str(inside)):
        (prompt,) = read_prompts(prompts(tmp_path, image))
        assert prompt.image is not None and prompt.image.resolve() == inside


def test_the_user_may_allow_other_folders(tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PICTURE_FOLDERS, os.pathsep.join([str(tmp_path / "other"), str(secret.parent)]))
    for image in (str(secret), "../private/photo.png"):
        (prompt,) = read_prompts(prompts(tmp_path, image))
        assert prompt.image is not None and prompt.image.resolve() == secret
    with pytest.raises(PromptsUnusable):
        read_prompts(prompts(tmp_path, "/etc/passwd"))


def test_a_dataset_in_the_hugging_face_cache_keeps_its_pictures(tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "plain"
    prompts(tmp_path, "images/photo.png", "plain/prompts.jsonl")
    (folder / "images").mkdir()
    (folder / "images" / "photo.png").write_bytes(secret.read_bytes())
    cached = into_cache(folder, tmp_path / "cache", "datasets--someone--set")
    assert (cached / "images" / "photo.png").is_symlink()
    assert len(read_prompts(cached / "prompts.jsonl")) == 1


def test_published_layouts_keep_pictures_above_the_file_but_not_anywhere(tmp_path: Path, secret: Path) -> None:
    """HarmBench's table lies beside the folder of its pictures."""
    columns = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID,ImageFileName"
    table = tmp_path / "bench" / "tables" / "harmbench.csv"
    table.parent.mkdir(parents=True)
    pictures = tmp_path / "bench" / "multimodal_behavior_images"
    pictures.mkdir()
    (pictures / "one.png").write_bytes(secret.read_bytes())
    table.write_text(f"{columns}\nsay it,standard,x,,,one,one.png\n")
    (prompt,) = read_prompts(f"harmbench:{table}")
    assert prompt.image is not None and prompt.image.resolve() == pictures / "one.png"
    for image in ("../../private/photo.png", str(secret)):
        table.write_text(f"{columns}\nsay it,standard,x,,,one,{image}\n")
        with pytest.raises(PromptsUnusable):
            read_prompts(f"harmbench:{table}")
