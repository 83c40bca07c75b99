"""Small files that unpack or parse to far more than they are: `.npz`, `guard.toml`, JSON."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vlmguard.exporter.calibration.guard_config import read_config
from vlmguard.exporter.calibration.toml_depth import DEEPEST, require_shallow
from vlmguard.exporter.checkpoints.convert import read_config as read_checkpoint_config
from vlmguard.exporter.proof import npz
from vlmguard.exporter.proof.npz import read_npz
from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.errors import GuardError
from vlmguard.graphs.json_files import read_json
from vlmguard.graphs.manifest import read_manifest


def refusal(action, *arguments: object) -> str:
    with pytest.raises(GuardError) as raised:
        action(*arguments)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a." * 50_000 + "a = 1", f"a key has more than {DEEPEST} parts"),
        ("[" + "a." * 50_000 + "a]", f"a key has more than {DEEPEST} parts"),
        ('"a" . ' * 5_000 + "b = 1", f"a key has more than {DEEPEST} parts"),
        ("x = { " + "a." * 50_000 + "a = 1 }", f"a key has more than {DEEPEST} parts"),
        ("x = " + "[" * 50_000, f"lists and tables lie more than {DEEPEST} deep in one another"),
        ("x = " + "{a=" * 50_000, f"lists and tables lie more than {DEEPEST} deep in one another"),
    ],
)
def test_toml_that_nests_is_refused_before_it_is_parsed(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "guard.toml"
    path.write_text(text)
    assert refusal(read_config, path) == f"{path}: is not TOML ({reason}); correct it there"


@pytest.mark.parametrize(
    "text",
    [
        'directions = "a.b.c.d.e.f.g.h.i.j.k.safetensors"',
        "directions = 'a.b.c.d.e.f.g.h.i.j.k.safetensors'  # v1.2.3.4.5.6.7.8.9.10.11",
        "x = '''\n" + "a." * 100 + "\n'''",
        'x = """\n' + "[" * 100 + '\\""" """',
        "[layers.3]\nthreshold = -1.25\ntarget = [0.71, -1e-3]\n" * 200,
        "[guard]\nlayers = [" + ", ".join(map(str, range(1000))) + "]",
        "'" * 10_001,
        '"\n' * 10_000,
        '"""' + "\\" * 9_999,
    ],
)
def test_toml_that_does_not_nest_passes(text: str) -> None:
    require_shallow(text)


def test_an_npz_is_measured_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "inputs.npz"
    np.savez_compressed(path, input_ids=np.zeros((4, 50_000), np.int64))
    assert path.stat().st_size < 10_000 and read_npz(path)["input_ids"].shape == (4, 50_000)
    monkeypatch.setattr(npz, "LARGEST", 1_000_000)
    assert refusal(read_npz, path) == (
        f"{path}: is no .npz of arrays (1 arrays of 1600128 bytes, expected at most 1000000); write it with numpy.savez"
    )


def test_an_array_that_lies_about_its_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    header = np.lib.format.magic(1, 0) + (118).to_bytes(2, "little")
    header += b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input_ids.npy", header)
    assert refusal(read_npz, path).startswith(f"{path}: is no .npz of arrays (")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a FIFO")
def test_a_fifo_is_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    os.mkfifo(path)
    assert refusal(read_npz, path) == f"{path}: is no .npz of arrays (is no regular file); write it with numpy.savez"


def test_json_that_nests_is_refused(tmp_path: Path) -> None:
    deep = "[" * 200_000
    for name in ("config.json", "guard.json"):
        (tmp_path / name).write_text('{"a": ' + deep)
    assert "recursion" in refusal(read_json, tmp_path / "config.json")
    assert "recursion" in refusal(read_manifest, tmp_path)
    assert "recursion" in refusal(read_checkpoint_config, tmp_path)


@pytest.mark.parametrize("header", [b"{" * 100_000, b'{"a":' * 100_000, json.dumps({"x": {"dtype": "F64"}}).encode()])
def test_a_safetensors_header_is_the_librarys_to_refuse(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "directions.safetensors"
    for size in (len(header), 2**63, 2**40):
        path.write_bytes(size.to_bytes(8, "little") + header)
        assert refusal(read_directions, path).startswith(f"{path}: is not a safetensors file (")
