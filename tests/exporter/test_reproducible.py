"""The same input gives the same bytes; and the bill of materials is one, by the schema of CycloneDX."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hand_graphs import directions
from random_directions import write_directions
from small_guarded import NAME, sha256, small_model
from tiny_vlm_paths import digests

import vlmguard
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.errors import ExtraMissing, GuardError
from vlmguard.graphs.extras import install_command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reproducible")
    write_directions(root / "d.safetensors", directions((0, 1)))
    return small_model(root / "model").parent


def exported(model: Path, out: Path, **options: object) -> Path:
    found = model.parent / "d.safetensors"
    return vlmguard.export(model, out, directions=found, proof="structure", **options).out  # type: ignore[arg-type]


def created(folder: Path) -> str:
    return json.loads((folder / "guard.json").read_text())["created"]


def test_two_exports_differ_in_the_manifests_time_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = exported(model, tmp_path / "a"), exported(model, tmp_path / "b")
    left, right = digests(first), digests(second)
    assert len(left) == 6 and left.keys() == right.keys()
    assert {name for name in left if left[name] != right[name]} <= {"guard.json"}
    texts = [(folder / "guard.json").read_text().replace(created(folder), "TIME") for folder in (first, second)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("wish", [{"sbom": True}, {}])
def test_reproducible_fixes_the_time_too(model: Path, tmp_path: Path, wish: dict) -> None:
    first, second = (exported(model, tmp_path / name, reproducible=True, **wish) for name in ("a", "b"))
    assert digests(first) == digests(second)
    assert created(first) == "1970-01-01T00:00:00+00:00"
    assert verify(first, model).ok


def test_the_time_is_that_of_source_date_epoch(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert created(exported(model, tmp_path / "a", reproducible=True)) == "2023-11-14T22:13:20+00:00"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(GuardError) as raised:
        exported(model, tmp_path / "b", reproducible=True)
    assert str(raised.value) == (
        "SOURCE_DATE_EPOCH is 'yesterday', expected whole seconds since 1970; set it, or unset it"
    )


def test_no_files_time_of_change_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only big files have one at all: opening does not hash them again."""
    monkeypatch.setattr("vlmguard.graphs.manifest.BIG", 1000)
    times = {}
    for reproducible in (False, True):
        out = exported(model, tmp_path / str(reproducible), reproducible=reproducible)
        files = json.loads((out / "guard.json").read_text())["files"]
        times[reproducible] = {name for name, record in files.items() if record["modified_ns"]}
    assert times[True] == set()
    assert times[False] == {name for name, record in files.items() if record["size"] >= 1000} != set()


def test_the_bill_of_materials_is_valid_and_lists_every_file(model: Path, tmp_path: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    out = exported(model, tmp_path / "out", sbom=True)
    text = (out / "sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    listed = {part["name"]: part["hashes"][0] for part in bom["components"]}
    files = [path for path in sorted(out.rglob("*")) if path.name not in ("guard.json", "sbom.cdx.json")]
    assert listed == {p.relative_to(out).as_posix(): {"alg": "SHA-256", "content": sha256(p)} for p in files}
    made_of = bom["metadata"]["component"]["pedigree"]["ancestors"]
    assert [(part["name"], part["hashes"][0]["content"]) for part in made_of] == [(NAME, sha256(model / NAME))]
    tools = {tool["name"]: tool["version"] for tool in bom["metadata"]["tools"]["components"]}
    assert tools["vlmguard"] == vlmguard.__version__
    assert "sbom.cdx.json" in json.loads((out / "guard.json").read_text())["files"]
    assert verify(out, model).ok


def test_a_bill_of_materials_needs_its_extra(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: Callable[[str], None]
) -> None:
    block("cyclonedx")
    with pytest.raises(ExtraMissing) as raised:
        exported(model, tmp_path / "out", sbom=True)
    assert str(raised.value) == f"a bill of materials needs cyclonedx-python-lib; run: {install_command('sbom')}"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def block(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a package, and what is in it, as if it were not installed."""
    import sys

    def blocked(package: str) -> None:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return blocked
