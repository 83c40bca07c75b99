"""`guard.toml`: what is written is read back, what is edited counts, and what is not known is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_directions import random_directions
from tiny_vlm_paths import DECODER, SOURCE, Guarded, digests

from vlmguard.exporter.calibration.guard_config import GuardConfig, read_config, require_directions, to_toml
from vlmguard.exporter.pipeline import export
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.directions import Directions, read_directions
from vlmguard.graphs.errors import DirectionMismatch, GuardError, ManifestMismatch
from vlmguard.graphs.manifest import read_manifest
from vlmguard.graphs.spec import GuardSpec

pytest_plugins = ("tiny_vlm_fixtures",)

PLAIN = 'schema = "vlmguard.config/1"\n[guard]\nmode = "restore"\nlayers = [1]\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the tiny VLM with nothing beside it."""
    return shutil.copytree(SOURCE, tmp_path / "models" / "tiny")


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------ round trip


SPECS = [
    GuardSpec(mode="restore", layers=(1, 2), rank=2),
    GuardSpec(mode="supervise", layers=(1,), rank=1, alpha=0.1, positions="all", lowering="rank1", target="tensorrt"),
    GuardSpec(mode="steer", layers=(2,), alpha=4.0, tau=-1e29),
    GuardSpec(mode="project", layers=(0, 1, 2), direction_of=1),
    GuardSpec(mode="combined", layers=(0, 1), rank=1, gate="prompt", knobs=True, telemetry=True),
    GuardSpec(),
]


EDITED = """\
# ours since March
schema = 'vlmguard.config/1'   # the only one
directions = "own.safetensors"

[layers.1]
threshold = -1.250   # by hand

[guard]
rank = 2
# the later layers do nothing
layers = [ 1,
           2 ]
mode = "restore"
positions = "last"   # the default
"""


def test_an_edited_file_keeps_its_comments_and_gets_what_it_lacks(tmp_path: Path) -> None:
    found = random_directions(16, range(3), rank=2)
    config = read_config(written(tmp_path / "guard.toml", EDITED))
    numbers = config.applied(found)
    text = to_toml(config.spec, "directions.safetensors", numbers, edited=config.text)
    kept = EDITED.replace("own.safetensors", "directions.safetensors")
    targets = {number: f"[{', '.join(map(str, numbers.layers[number].target))}]" for number in (1, 2)}
    new = f"target = {targets[1]}\n\n[layers.2]\nthreshold = 0.0\ntarget = {targets[2]}\n"
    assert text == kept.replace("# by hand\n", f"# by hand\n{new}")
    again = read_config(written(tmp_path / "again.toml", text))
    assert again.spec == config.spec
    assert to_toml(again.spec, "directions.safetensors", again.applied(found), edited=again.text) == text


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_written_is_read_back(spec: GuardSpec, tmp_path: Path) -> None:
    found = random_directions(16, range(3), rank=2)
    config = read_config(written(tmp_path / "guard.toml", to_toml(spec, "d.safetensors", found, ["a comment"])))
    assert config.spec == spec and config.directions == tmp_path / "d.safetensors"
    same = config.applied(found)
    for number in spec.layers or found.layers:
        rank = spec.rank if config.numbers else None
        for name in ("ssd", "readout", "origin", "target"):
            expected = getattr(found.layers[number], name)
            rows = expected if name == "readout" else expected[:rank]
            np.testing.assert_array_equal(getattr(same.layers[number], name), rows)
        assert same.layers[number].threshold == found.layers[number].threshold
        assert same.layers[number].text_threshold == found.layers[number].text_threshold


@settings(max_examples=50, deadline=None)
@given(
    st.floats(width=32, min_value=-(2**90), max_value=2**90), st.floats(width=32, allow_nan=False, allow_infinity=False)
)
def test_every_float32_comes_back_to_the_bit(threshold: float, level: float) -> None:
    import tempfile
    from dataclasses import replace

    found = random_directions(8, [3], rank=1)
    layer = replace(found.layers[3], threshold=threshold, target=np.array([level], np.float32))
    found = Directions(8, {3: layer})
    with tempfile.TemporaryDirectory() as folder:
        text = to_toml(GuardSpec(mode="restore", layers=(3,)), "d", found)
        config = read_config(written(Path(folder) / "guard.toml", text))
    same = config.applied(found).layers[3]
    assert same.threshold == threshold and same.target == np.float32(level)


def test_a_calibration_writes_one_that_exports_the_same_guard(guarded: Guarded, source: Path, tmp_path: Path) -> None:
    """From its folder to the same graph, number for number; and it says in words what was measured."""
    folder = guarded("restore")
    text = (folder / "guard.toml").read_text(encoding="utf-8")
    assert "# Calibrated on 306 prompts" in text and "random directions" in text and "shuffled labels" in text
    assert "guard.toml" not in read_manifest(folder).files  # whoever edits it changes no guard yet
    again = export(source, config=folder / "guard.toml").out
    assert digests(again)[DECODER] == digests(folder)[DECODER]
    assert verify(again, source).ok
    assert read_config(again / "guard.toml").spec == read_config(folder / "guard.toml").spec


def test_an_edited_number_is_what_the_graph_computes_with(guarded: Guarded, source: Path, tmp_path: Path) -> None:
    home = shutil.copytree(guarded("restore"), tmp_path / "home")
    lines = (home / "guard.toml").read_text(encoding="utf-8").splitlines()
    edited = ["threshold = 0.5" if line.startswith("threshold") else line for line in lines]
    path = written(home / "guard.toml", "\n".join(edited).replace('"restore"\n', '"restore"\npositions = "all"\n'))
    with pytest.raises(ManifestMismatch) as caught:  # the guarded folder is what it was, and its guard.toml is not
        verify(home)
    assert str(caught.value).startswith(
        f"{path}: guard.positions is all, the graph has last; export again with --config"
    )
    result = export(source, config=path, allow_no_effect=True)  # a threshold that none of the built-in prompts reaches
    assert {site.guard.threshold for site in result.plan.sites} == {0.5} and result.plan.positions == "all"
    layers = read_directions(result.out / "directions.safetensors").layers
    assert {layers[number].threshold for number in result.plan.layers} == {0.5}
    assert verify(result.out, source).ok


# -------------------------------------------------------------------------------------------------------------- refusals


def refusal(error: type[GuardError], call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("treshold = 1\n" + PLAIN, "treshold is not known; expected schema, directions, guard, layers"),
        (
            PLAIN + "[layers.1]\ntreshold = 1\n",
            "layers.1.treshold is not known; expected threshold, text_threshold, target, origin",
        ),
        (PLAIN + "[layers.first]\n", "layers.first is not known; expected a layer's number, as in [layers.3]"),
        (PLAIN + "[layers.1]\ntext_threshold = [1]\n", "layers.1.text_threshold is [1], expected a number"),
        (PLAIN + 'knobs = "yes"\n', "guard.knobs is 'yes', expected true or false"),
        (PLAIN + "telemetry = 1\n", "guard.telemetry is 1, expected true or false"),
        (PLAIN + "gate = true\n", "guard.gate is True, expected a text"),
        (PLAIN + 'gate = "never"\n', "gate 'never' is unknown; choose one of token, prompt"),
        (PLAIN + '[layers.1]\nthreshold = "low"\n', "layers.1.threshold is 'low', expected a number"),
        (PLAIN + "[layers.1]\ntarget = 3\n", "layers.1.target is 3, expected a list of numbers"),
        (PLAIN + "[layers.1]\nthreshold = true\n", "layers.1.threshold is True, expected a number"),
        (PLAIN.replace("[1]", '"1"'), "guard.layers is '1', expected a list"),
        (PLAIN.replace("[1]", "[-1]"), "guard.layers is [-1], expected layer numbers from 0, such as [3, 4]"),
        (PLAIN + 'rank = "one"\n', "guard.rank is 'one', expected a whole number"),
        (PLAIN + "rank = 65\n", "rank 65 is out of range; choose 1 to 64"),
        (
            PLAIN.replace("restore", "hope"),
            "mode 'hope' is unknown; choose one of project, steer, supervise, restore, combined, align",
        ),
        (PLAIN + "alpha = -1\n", "alpha -1 would remove safety or is not a number; choose 0 or more"),
        ("directions = 3\n" + PLAIN, "directions is 3, expected the name of a file beside it"),
        (
            "[guard]\n",
            "schema is None, this version reads 'vlmguard.config/1'; calibrate again, or correct it",
        ),
        (PLAIN + "[layers.3]\n[layers.03]\n", "layers.03 is not how layer 3 is written; write [layers.3]"),
        (PLAIN + '[layers."²"]\n', "layers.² is not known; expected a layer's number, as in [layers.3]"),
        (PLAIN + '[layers."٣"]\n', "layers.٣ is not known; expected a layer's number, as in [layers.3]"),
        (
            'directions = "a/~/d"\n' + PLAIN,
            "directions: a/~/d: has a folder named ~, which a shell would not reach; write the home folder's full path",
        ),
        ('guard = 3\nschema = "vlmguard.config/1"\n', "guard is 3, expected a table [guard]"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(text: str, sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path / "guard.toml", text)
    assert refusal(GuardError, read_config, path) == f"{path}: {sentence}"


def test_an_unknown_option_names_the_known_ones(tmp_path: Path) -> None:
    path = written(tmp_path / "guard.toml", PLAIN + "strenght = 2\n")
    sentence = refusal(GuardError, read_config, path)
    assert sentence.startswith(
        f"{path}: guard.strenght is not known; expected mode, layers, rank, alpha, tau, positions"
    )


def test_what_is_not_toml_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "guard.toml", "layers = [1,")
    sentence = refusal(GuardError, read_config, path)
    assert sentence.startswith(f"{path}: is not TOML (") and sentence.endswith("); correct it there")
    gone = tmp_path / "gone.toml"
    assert refusal(GuardError, read_config, gone) == (
        f"{gone}: no such config file; a calibrating export writes one, guard.toml"
    )


def test_names_in_a_config_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    path = written(tmp_path / "configs" / "guard.toml", 'directions = "../d.safetensors"\n' + PLAIN)
    monkeypatch.chdir(tmp_path / "configs")
    assert read_config("guard.toml").directions == Path("../d.safetensors")
    assert read_config(path).directions == tmp_path / "configs" / "../d.safetensors"
    assert refusal(GuardError, require_directions, path, read_config(path)) == (
        f"{path}: its directions file {tmp_path / 'configs' / '../d.safetensors'} is missing; names in a guard.toml are "
        "relative to its own folder, correct `directions` there"
    )
    (tmp_path / "d.safetensors").write_bytes(b"")
    require_directions(path, read_config(path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = written(tmp_path / "guard.toml", 'directions = "~/d.safetensors"\n' + PLAIN)
    assert read_config(path).directions == tmp_path / "home" / "d.safetensors"


def test_numbers_of_a_layer_that_is_not_guarded_are_refused() -> None:
    found = random_directions(8, [1, 2], rank=1)
    config = GuardConfig(GuardSpec(mode="restore", layers=(1,)), Path("d"), {2: {"threshold": 1.0}})
    assert refusal(DirectionMismatch, config.applied, found) == (
        "[layers.2] was given, the guard is wanted on layers 1 and the directions hold 1, 2; leave the table out, or extract "
        "directions for other layers (`vlmguard directions`)"
    )
    config = GuardConfig(GuardSpec(mode="restore", layers=(1,)), Path("d"), {1: {"target": [1.0, 2.0]}})
    assert refusal(DirectionMismatch, config.applied, found) == "layers.1.target has shape (2,), expected (1,)"


def test_a_threshold_of_another_mode_is_not_taken_over(guarded: Guarded, source: Path, tmp_path: Path) -> None:
    """Whoever turns `restore` into `steer` has numbers of `restore`: each mode is calibrated by itself."""
    home = shutil.copytree(guarded("restore"), tmp_path / "home")
    text = (home / "guard.toml").read_text(encoding="utf-8")
    path = written(home / "guard.toml", text.replace('mode = "restore"', 'mode = "steer"'))
    assert refusal(DirectionMismatch, export, source, config=path) == (
        "the directions' thresholds were calibrated for restore, not for steer; give --tau, or calibrate again with --anchors"
    )


def test_a_config_is_the_only_one_who_says_what_is_wanted(source: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "guard.toml", PLAIN)
    for more in ({"spec": GuardSpec()}, {"directions": tmp_path / "d"}, {"anchors": tmp_path / "a"}):
        assert refusal(GuardError, export, source, config=path, **more) == (
            f"{path}: already has the guard and its directions; leave spec, directions, anchors and calibration out, "
            "or edit it"
        )
