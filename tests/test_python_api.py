"""The Python API: what `dir` and `help` show, documented arguments, settings without a `GuardSpec`, errors, examples."""

from __future__ import annotations

import inspect
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_vlm_paths import SOURCE, Guarded

import vlmguard
from vlmguard.exporter.options import ExportSettings, options_of
from vlmguard.exporter.requests import spec_of
from vlmguard.runtime.generation import Request
from vlmguard.runtime.images.open_picture import open_image

pytest_plugins = ("tiny_vlm_fixtures",)

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "python"


def test_dir_shows_the_api_and_loads_nothing() -> None:
    code = (
        "import sys, vlmguard\nnames = dir(vlmguard)\n"
        "print([name for name in names if not name.startswith('_')] == sorted(vlmguard.__all__))\n"
        "print([name for name in ('numpy', 'onnx', 'torch', 'onnxruntime') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n[]\n", "")


def test_help_shows_every_name() -> None:
    import pydoc

    text = pydoc.plain(pydoc.render_doc(vlmguard))
    for name in vlmguard.__all__:
        assert re.search(rf"\b(class )?{name}\(", text), name
    documented = vlmguard.__doc__ or ""
    for name in vlmguard.__all__:
        if name not in ("DecoderAnatomy", "ExportResult", "GuardError", "Verification", "read_directions"):
            assert re.search(rf"^    {name}\b", documented, re.MULTILINE), name


def functions() -> list[Any]:
    """Public functions, and public methods of public classes that are ours."""
    found = []
    for name in vlmguard.__all__:
        public = getattr(vlmguard, name)
        if inspect.isclass(public):
            for method, member in inspect.getmembers(public, lambda m: inspect.isfunction(m) or inspect.ismethod(m)):
                ours = (getattr(member, "__module__", "") or "").startswith("vlmguard.")
                if ours and not method.startswith("_"):
                    found.append(member)
        else:
            found.append(public)
    return found


@pytest.mark.parametrize("function", functions(), ids=lambda function: function.__qualname__)
def test_every_argument_of_a_long_signature_is_documented(function: Any) -> None:
    arguments = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    text = inspect.getdoc(function) or ""
    assert text, "has no docstring"
    if len(arguments) >= 4:
        missing = [name for name in arguments if not re.search(rf"^ +{name}: ", text, re.MULTILINE)]
        assert missing == []


def test_export_takes_every_attribute_of_the_guard_and_of_the_options_by_name() -> None:
    names = {field.name for kind in (vlmguard.GuardSpec, vlmguard.ExportOptions) for field in fields(kind)}
    assert set(ExportSettings.__annotations__) == names
    text = inspect.getdoc(vlmguard.ExportOptions) or ""
    assert [field.name for field in fields(vlmguard.ExportOptions) if f"\n    {field.name}: " not in text] == []


def test_an_unknown_setting_is_a_type_error_with_the_nearest_name(tmp_path: Path) -> None:
    export: Any = vlmguard.export
    with pytest.raises(TypeError) as caught:
        export(tmp_path, positons="all")
    assert str(caught.value) == "export() has no setting 'positons'; did you mean 'positions'?"
    with pytest.raises(TypeError) as caught:
        export(tmp_path, zzz=1)
    assert str(caught.value) == "export() has no setting 'zzz'; help(vlmguard.ExportOptions) lists them"


def test_settings_replace_attributes_of_the_options() -> None:
    options = options_of(
        vlmguard.ExportOptions(proof="local", force=True), {"mode": "steer", "layers": "2-4", "force": False}
    )
    assert (options.proof, options.force) == ("local", False)
    assert options.spec == vlmguard.GuardSpec(mode="steer", layers=(2, 3, 4))


# ------------------------------------------------------------------------------------------------- settings without a GuardSpec


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("2-4", (2, 3, 4)),
        ([4, 2, 2], (2, 4)),
        (3, (3,)),
        (range(2), (0, 1)),
        (np.array([1, 2]), (1, 2)),
        ("auto", None),
    ],
)
def test_layers_are_numbers_or_text(layers: Any, expected: tuple[int, ...] | None) -> None:
    spec = spec_of(None, layers, mode="restore", rank=2)
    assert spec == vlmguard.GuardSpec(mode="restore", layers=expected, rank=2)


def test_nothing_named_is_no_spec() -> None:
    spec = vlmguard.GuardSpec(mode="steer")
    assert spec_of(None) is None and spec_of(spec) is spec and spec_of(None, mode="auto") is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mode": 3}, "mode is 3 (int); give the name of a mode"),
        (
            {"mode": "magic"},
            "mode 'magic' is unknown; choose one of project, steer, supervise, restore, combined, align",
        ),
        ({"layers": 1.5}, "layers holds 1.5 (float); give layer numbers from 0, as [2, 3], or text such as '2-4'"),
        ({"layers": [True]}, "layers holds True (bool); give layer numbers from 0, as [2, 3], or text such as '2-4'"),
        ({"layers": [-1]}, "layers holds -1 (int); give layer numbers from 0, as [2, 3], or text such as '2-4'"),
        ({"rank": "4"}, "rank is '4' (str); give a whole number"),
        ({"rank": True}, "rank is True (bool); give a whole number"),
        ({"tau": [1]}, "tau is [1] (list); give a number"),
        ({"spec": "restore"}, "spec is 'restore' (str); give a vlmguard.GuardSpec, or mode=... and layers=..."),
        (
            {"spec": vlmguard.GuardSpec(), "mode": "steer", "layers": 2},
            "mode, layers and spec exclude each other; put them into the spec",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(vlmguard.GuardError) as refused:
        vlmguard.export(SOURCE, dry_run=True, **arguments)
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: vlmguard.export(5, "out"), "model is 5 (int); give a path, as text or as a pathlib.Path"),  # type: ignore[arg-type]
        (lambda: vlmguard.inspect(None), "model is None (NoneType); give a path, as text or as a pathlib.Path"),  # type: ignore[arg-type]
        (
            lambda: vlmguard.extract_directions(SOURCE, 5),  # type: ignore[arg-type]
            "output is 5 (int); give a path, as text or as a pathlib.Path",
        ),
        (lambda: Request(5), "the prompt is of type int; give text"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_type_is_one_line(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(vlmguard.GuardError) as refused:
        call()
    assert str(refused.value) == sentence


# -------------------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_is_a_path_bytes_a_pillow_image_or_an_array(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.save(file, "PNG")
    path = tmp_path / "p.png"
    path.write_bytes(file.getvalue())
    for source in (pixels, picture, path, str(path), file.getvalue(), bytearray(file.getvalue())):
        np.testing.assert_array_equal(np.asarray(open_image(source)), pixels)  # type: ignore[arg-type]
    grey = open_image(pixels[..., 0])
    assert grey.mode == "RGB" and grey.size == (7, 5)
    see_through = np.concatenate([pixels, np.zeros((5, 7, 1), np.uint8)], axis=2)
    assert np.asarray(open_image(see_through)).min() == 255  # on white


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (3, "the image is of type int; give a path, the bytes of a file, a Pillow image or a uint8 array"),
        (
            np.zeros((2, 2, 3)),
            "the image is an array of float64 with shape (2, 2, 3); give uint8 of shape [height, width, 3], "
            "[height, width, 4] or [height, width]",
        ),
        (
            np.zeros((3, 2, 2), np.uint8),
            "the image is an array of uint8 with shape (3, 2, 2); give uint8 of shape [height, width, 3], "
            "[height, width, 4] or [height, width]",
        ),
    ],
)
def test_what_is_no_picture_is_one_line(source: Any, sentence: str) -> None:
    with pytest.raises(vlmguard.GuardError) as refused:
        open_image(source)
    assert str(refused.value) == sentence


# -------------------------------------------------------------------------------------------------------------- representations


def test_values_are_shown_in_one_short_line(guarded: Guarded) -> None:
    folder = guarded("restore")
    anatomy, vlm = vlmguard.inspect(SOURCE), vlmguard.GuardedVLM.open(folder)
    layers = vlm.manifest.plan["layers"]
    assert repr(anatomy) == "DecoderAnatomy(6 layers of width 128, confirmed)"
    assert repr(vlm) == f"GuardedVLM({str(folder)!r}, restore on layers {layers})"
    assert repr(vlmguard.verify(folder)).startswith("Verification(verified, ")
    assert repr(vlmguard.read_directions(folder / "directions.safetensors")).startswith("Directions(layers ")
    result = vlmguard.export(SOURCE, mode="restore", directions=folder / "directions.safetensors", dry_run=True)
    assert re.fullmatch(r"ExportResult\('.+', restore on layers .+, proved \w+, not written\)", repr(result))
    assert all(len(repr(value)) < 400 for value in (anatomy, vlm, result))


# -------------------------------------------------------------------------------------------------------------------- examples


@pytest.fixture
def places(guarded: Guarded, tmp_path: Path) -> SimpleNamespace:
    """What the examples are given."""
    folder = guarded("restore")
    directions = vlmguard.read_directions(folder / "directions.safetensors")
    np.savez(tmp_path / "arrays.npz", **{str(number): layer.ssd for number, layer in directions.layers.items()})
    return SimpleNamespace(guarded=folder, directions=folder / "directions.safetensors", tmp=tmp_path)


def run(name: str, *arguments: object) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT.parent), os.environ.get("PYTHONPATH")]))
    }
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_that_guards_a_model(places: SimpleNamespace) -> None:
    said = run("guard_a_model.py", SOURCE, places.tmp / "out", places.directions)
    assert said.startswith(f"ExportResult({str(places.tmp / 'out')!r}, restore on layers")
    assert "checks of the proof hold" in said and vlmguard.verify(places.tmp / "out").ok


def test_the_example_with_directions_of_your_own(places: SimpleNamespace) -> None:
    said = run("own_directions.py", SOURCE, places.tmp / "arrays.npz", places.tmp / "own.safetensors")
    found = vlmguard.read_directions(places.tmp / "own.safetensors")
    assert repr(found) in said and all(f"layer {number}: rank" in said for number in found.layers)


def test_the_example_that_checks_a_folder(places: SimpleNamespace) -> None:
    said = run("check_a_folder.py", places.guarded, SOURCE)
    assert said.startswith("Verification(verified, ") and "FAILS" not in said and said.count("holds") >= 10


def test_every_example_is_run() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{path.name}"' in text for path in EXAMPLES.glob("*.py"))
    assert len([*EXAMPLES.glob("*.py")]) == 3


def test_the_page_on_directions_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "directions.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.+?)```", page, re.DOTALL)
    assert len(code.strip().splitlines()) <= 7
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, "(1, 128)\n"), done.stderr
