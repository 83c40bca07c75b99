"""Prompts from files: what is read, and every refusal word for word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny_vlm_paths import ANCHORS, CALIBRATION, EVALUATION, PROMPTS, SOURCE

from vlmguard.exporter.prompts import files as prompt_files
from vlmguard.exporter.prompts.labelled import (
    AnchorPair,
    LabelledPrompt,
    find_file,
    fingerprint,
    prompts_from_anchors,
    read_anchors,
    read_prompts,
)
from vlmguard.graphs.errors import PromptsUnusable

ONE, TWO = {"harmful": "how to steal", "harmless": "how to wash"}, {"harmful": "rob it", "harmless": "mend it"}
PAIRS = [AnchorPair("how to steal", "how to wash"), AnchorPair("rob it", "mend it")]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(PromptsUnusable) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- anchors


def test_anchors_are_read_from_lines_a_list_or_a_csv(tmp_path: Path) -> None:
    as_lines = lines(tmp_path / "a.jsonl", ONE, TWO | {"note": "more keys do not matter"})
    as_list = text(tmp_path / "a.json", json.dumps([ONE, TWO], indent=2))
    as_csv = text(tmp_path / "a.csv", "note,harmless,harmful\nx,how to wash,how to steal\ny,mend it,rob it\n")
    for path in (as_lines, as_list, as_csv):
        assert read_anchors(path) == PAIRS


def test_anchors_may_have_blank_lines_a_byte_order_mark_and_spaces(tmp_path: Path) -> None:
    rows = [json.dumps(ONE), "", json.dumps({"harmful": " rob it ", "harmless": "mend it\n"}), ""]
    assert read_anchors(text(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(rows))) == PAIRS


def test_the_examples_own_prompts_are_read() -> None:
    pairs, calibration, evaluation = read_anchors(ANCHORS), read_prompts(CALIBRATION), read_prompts(EVALUATION)
    assert len(pairs) == len(ANCHORS.read_text().splitlines()) >= 50
    for rows, path in ((calibration, CALIBRATION), (evaluation, EVALUATION)):
        assert len(rows) == len(path.read_text().splitlines()) >= 100
        assert {(row.setting, row.label) for row in rows} == {
            (setting, label) for setting in ("text", "blank", "image") for label in ("harmful", "harmless")
        }
    # No prompt of one set is in another one: figures are for prompts that nothing was fitted on.
    assert not {fingerprint(row) for row in calibration} & {fingerprint(row) for row in evaluation}
    anchored = {text for pair in pairs for text in (pair.harmful, pair.harmless)}
    assert not anchored & {row.prompt for row in [*calibration, *evaluation]}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", "", 'holds no anchors; write lines of {{"harmful": "...", "harmless": "..."}}'),
        ("a.jsonl", "\n  \n", 'holds no anchors; write lines of {{"harmful": "...", "harmless": "..."}}'),
        ("a.json", "[]", 'holds no anchors; write lines of {{"harmful": "...", "harmless": "..."}}'),
        ("a.csv", "harmful,harmless\n", 'holds no anchors; write lines of {{"harmful": "...", "harmless": "..."}}'),
        ("a.jsonl", json.dumps(ONE), "holds 1 anchor pair; a direction needs at least 2, better 100"),
        (
            "a.jsonl",
            json.dumps(ONE) + '\n{"harmful": "x"}',
            "anchor 2 has no harmless prompt; pair each harmful one with one",
        ),
        (
            "a.jsonl",
            json.dumps(ONE) + '\n\n{"harmful": " ", "harmless": "x"}',
            "anchor 3 has no harmful prompt; pair each harmless one with one",
        ),
        (
            "a.jsonl",
            '{"harmful": ["x"], "harmless": "y"}',
            "anchor 1 has no harmful prompt; pair each harmless one with one",
        ),
        ("a.csv", "harmful,harmless\nx,\n", "anchor 1 has no harmless prompt; pair each harmful one with one"),
        ("a.csv", "harmful\nx\n", "anchor 1 has no harmless prompt; pair each harmful one with one"),
        (
            "a.jsonl",
            "how to steal",
            "is not lines of JSON (Expecting value: line 1 column 1 (char 0)); one object a line",
        ),
        ("a.jsonl", '["harmful", "harmless"]', "line 1 is list, expected an object"),
        ("a.json", '{"harmful": "x", "harmless": "y"}', "line 1 is str, expected an object"),
        ("a.json", "7", "is not lines of JSON ('int' object is not iterable); one object a line"),
    ],
)
def test_anchors_that_cannot_be_used_are_refused(tmp_path: Path, name: str, content: str, sentence: str) -> None:
    path = text(tmp_path / name, content)
    assert refusal(read_anchors, path) == f"{path}: {sentence.replace('{{', '{').replace('}}', '}')}"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert refusal(read_anchors, path) == f"{path}: no such anchors file; give one with lines of JSON, or a csv"
    assert refusal(read_prompts, path) == f"{path}: no such prompts file; give one with lines of JSON, or a csv"
    assert refusal(read_anchors, tmp_path) == f"{tmp_path}: no such anchors file; give one with lines of JSON, or a csv"


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = text(tmp_path / "a.jsonl", b"\xff\xfe\x00")
    assert refusal(read_anchors, path) == (
        f"{path}: is not readable text ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); save it "
        "as UTF-8"
    )


def test_hostile_files_are_refused_in_one_line(tmp_path: Path) -> None:
    deep = text(tmp_path / "deep.jsonl", "[" * 100_000)
    assert refusal(read_anchors, deep).endswith("; one object a line")
    wide = text(tmp_path / "wide.csv", "harmful,harmless\n" + "x" * 200_000 + ",y\n")
    assert refusal(read_anchors, wide) == (
        f"{wide}: is not a csv that can be read (field larger than field limit (131072)); save it again as UTF-8"
    )


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "LARGEST_FILE", 10)
    path = text(tmp_path / "a.jsonl", "x" * 11)
    assert refusal(read_anchors, path) == f"{path}: 11 bytes is too large for anchors; give a smaller file"


# ----------------------------------------------------------------------------------------------------- labelled prompts


def test_labelled_prompts_are_read_with_their_settings(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "x.png")
    path = lines(
        tmp_path / "p.jsonl",
        {"id": "a", "prompt": " steal it ", "label": "harmful", "setting": "text"},
        {"prompt": "wash it", "label": "harmless"},  # number and setting are not needed
        {"id": 7, "prompt": "steal it", "label": "harmful", "setting": "blank", "image": None},
        {"id": "d", "prompt": "what is it", "label": "harmless", "setting": "image", "image": "images/x.png"},
    )
    assert read_prompts(path) == [
        LabelledPrompt("a", "steal it", "harmful", "text"),
        LabelledPrompt("2", "wash it", "harmless", "text"),
        LabelledPrompt("7", "steal it", "harmful", "blank"),
        LabelledPrompt("d", "what is it", "harmless", "image", tmp_path / "images" / "x.png"),
    ]
    as_csv = text(tmp_path / "p.csv", "prompt,label,setting,image\nwhat is it,harmless,image,images/x.png\n")
    assert read_prompts(as_csv)[0].image == tmp_path / "images" / "x.png"


def test_only_the_setting_image_shows_a_picture(tmp_path: Path) -> None:
    """A picture beside a text prompt would be shown to the model and counted as text; a missing one would not be missed."""
    rows = [{"prompt": "x", "label": "harmful", "setting": s, "image": "gone.png"} for s in ("text", "blank")]
    assert [row.image for row in read_prompts(lines(tmp_path / "p.jsonl", *rows))] == [None, None]


GOOD = {"prompt": "x", "label": "harmful", "setting": "text"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": None}, "line 2 has no prompt; give each line a prompt, a label and a setting"),
        ({"prompt": "  "}, "line 2 has no prompt; give each line a prompt, a label and a setting"),
        ({"label": "bad"}, "line 2 has label 'bad'; expected harmful, harmless or borderline"),
        ({"label": None}, "line 2 has label None; expected harmful, harmless or borderline"),
        ({"label": ["harmful"]}, "line 2 has label ['harmful']; expected harmful, harmless or borderline"),
        ({"setting": "video"}, "line 2 has setting 'video'; expected text, blank, image, typographic"),
        ({"setting": None}, "line 2 has setting None; expected text, blank, image, typographic"),
        ({"setting": "typographic"}, "line 2 has setting typographic, but its image None is missing"),
        ({"setting": "image"}, "line 2 has setting image, but its image None is missing"),
        ({"setting": "image", "image": "gone.png"}, "line 2 has setting image, but its image 'gone.png' is missing"),
        ({"setting": "image", "image": "."}, "line 2 has setting image, but its image '.' is missing"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused(tmp_path: Path, row: dict, sentence: str) -> None:
    path = lines(tmp_path / "p.jsonl", GOOD, GOOD | row)
    assert refusal(read_prompts, path) == f"{path}: {sentence}"


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    path = text(tmp_path / "p.jsonl", "\n")
    assert refusal(read_prompts, path) == (
        f'{path}: holds no prompts; write lines of {{"prompt": "...", "label": "harmful"}}'
    )


# ------------------------------------------------------------------------------------------------- requests and look-up


class OneWhite:
    """As much of a model as a prompt needs."""

    white = Image.new("RGB", (4, 4), "white")

    def blank_image(self) -> Image.Image:
        return self.white


def test_each_setting_is_shown_as_it_says(tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    shown = {
        setting: LabelledPrompt("1", "x", "harmful", setting, picture if setting == "image" else None).request(
            OneWhite()
        )
        for setting in ("text", "blank", "image")
    }
    assert {request.prompt for request in shown.values()} == {"x"}
    assert shown["text"].image is None and shown["image"].image == picture
    assert shown["blank"].image is OneWhite.white


def test_a_fingerprint_is_what_is_asked(tmp_path: Path) -> None:
    pictures = [tmp_path / name for name in ("a.png", "b.png", "copy.png")]
    for path, color in zip(pictures, ("red", "blue", "red"), strict=True):
        Image.new("RGB", (4, 4), color).save(path)
    red, blue, copy = (LabelledPrompt("1", "x", "harmful", "image", path) for path in pictures)
    text_only, blank, other = (
        LabelledPrompt("1", p, "harmful", s) for p, s in (("x", "text"), ("x", "blank"), ("y", "text"))
    )
    assert len({fingerprint(prompt) for prompt in (red, blue, text_only, other)}) == 4
    assert fingerprint(blank) == fingerprint(text_only)  # a blank picture asks nothing
    assert fingerprint(copy) == fingerprint(red)  # neither its file name
    assert fingerprint(LabelledPrompt("2", "x", "harmless", "text")) == fingerprint(text_only)  # nor id and label


@pytest.mark.parametrize("sees", [True, False])
def test_prompts_from_anchors_have_both_labels_in_every_setting(sees: bool) -> None:
    made = prompts_from_anchors(PAIRS, sees)
    settings = ("text", "blank") if sees else ("text",)
    assert [(row.setting, row.prompt, row.label) for row in made] == [
        (setting, getattr(pair, label), label)
        for setting in settings
        for pair in PAIRS
        for label in ("harmful", "harmless")
    ]
    assert len({row.id for row in made}) == len(made)


def test_prompts_are_found_in_the_models_own_folders(tmp_path: Path) -> None:
    names = ("a.jsonl", "a.csv")
    root = tmp_path / "models" / "onnx-community"  # named as a part: the folder above is the model's own root
    root.mkdir(parents=True)
    assert find_file(root, names) is None
    # from the weakest place to the strongest: each beats those before it
    for place in ("models/prompts/a.jsonl", "models/a.csv", "prompts/a.jsonl", "a.csv", "a.jsonl"):
        path = tmp_path / place if place.startswith("models") else root / place
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        assert find_file(root, names) == path


def test_the_files_of_another_model_one_folder_up_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    (models / "m").mkdir(parents=True)
    (models / "prompts").mkdir()
    for place in ("a.jsonl", "prompts/a.jsonl"):
        (models / place).write_text("")
    assert find_file(models / "m", ("a.jsonl",)) is None
    monkeypatch.chdir(models / "m")
    assert find_file(Path(), ("a.jsonl",)) is None  # nor when the folder is named from inside


def test_the_examples_prompts_are_found_beside_its_model() -> None:
    assert find_file(SOURCE, ("calibration.jsonl",)) == PROMPTS / "calibration.jsonl"
