"""Signatures: with keys made here, offline. What no proof can tell, whose guard it is, they do."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from small_guarded import edit_graph, edit_manifest, guard_small, make_the_manifest_fit, small_model
from typer.testing import CliRunner

import vlmguard
from vlmguard import cli
from vlmguard.exporter.artifact.signing import check_signature, sign
from vlmguard.exporter.proof.verify import verify
from vlmguard.graphs.errors import ExtraMissing, GuardError, ManifestMismatch
from vlmguard.graphs.extras import install_command

SIGNED = "every file is what the key's owner signed"


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """`(private, public)`, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    made = {name: key_pair(folder, name) for name in ("ours", "theirs")}
    return made.__getitem__


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, keys: Callable) -> Path:
    """`signed/`, as export leaves it, and `model/`."""
    root = tmp_path_factory.mktemp("signing")
    model = small_model(root / "model")
    guard_small(model, root / "plain")
    shutil.copytree(root / "plain", root / "signed")
    sign(root / "signed", keys("ours")[0])
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "signed", tmp_path / "g")


def test_an_export_is_signed_before_it_has_its_name(made: Path, tmp_path: Path, keys: Callable) -> None:
    private, public = keys("ours")
    out = vlmguard.export(
        made / "model",
        tmp_path / "out",
        directions=made / "plain" / "directions.safetensors",
        proof="structure",
        sign=private,
    ).out
    result = verify(out, public_key=public)
    assert result.ok and result.checks[0].name == SIGNED
    assert result.checks[0].compared == len(result.manifest.files) + 1  # and the manifest
    assert verify(out).ok and (out / "model.sig").is_file()


def test_another_key_is_refused(folder: Path, keys: Callable) -> None:
    assert check_signature(folder, keys("ours")[1]).ok
    with pytest.raises(ManifestMismatch) as raised:
        verify(folder, public_key=keys("theirs")[1])
    assert str(raised.value).startswith(f"{folder}: is not what the owner of theirs.pub signed (")
    assert str(raised.value).endswith("); do not use it") and "\n" not in str(raised.value)


def other_guard(folder: Path) -> None:
    edit_graph(folder, lambda model: model.graph.output.reverse())
    make_the_manifest_fit(folder)


@pytest.mark.parametrize(
    "change",
    [
        other_guard,
        lambda folder: edit_manifest(folder, lambda manifest: manifest.update(created="2020-01-01T00:00:00+00:00")),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "NOTES.txt").write_text("more"),
        lambda folder: (folder / "model.sig").write_text("{}"),
        lambda folder: (folder / "model.sig").write_bytes((folder / "guard.json").read_bytes()),
    ],
    ids=["graph", "manifest", "file removed", "file added", "no signature in it", "another file's content"],
)
def test_whatever_changed_since_is_caught(folder: Path, keys: Callable, change: Callable) -> None:
    change(folder)
    with pytest.raises(ManifestMismatch, match=r"is not what the owner of ours\.pub signed \(.+\); do not use it"):
        verify(folder, public_key=keys("ours")[1])


def test_a_folder_that_nobody_signed_is_refused(made: Path, folder: Path, keys: Callable) -> None:
    (folder / "model.sig").unlink()
    with pytest.raises(ManifestMismatch) as raised:
        verify(folder, public_key=keys("ours")[1])
    assert str(raised.value) == f"{folder}: holds no model.sig, so it is not signed; sign it with `vlmguard sign`"


def test_a_folder_that_is_not_what_was_proved_is_not_signed(folder: Path, keys: Callable) -> None:
    edit_graph(folder, lambda model: model.graph.output.reverse())
    with pytest.raises(ManifestMismatch, match="SHA-256 differs"):
        sign(folder, keys("ours")[0])


def test_a_key_that_is_none_is_refused_before_anything_is_done(made: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.key"
    sentence = f"{bad}: no such key file; name an elliptic-curve key in PEM"
    for content in (None, "no key"):
        if content is not None:
            bad.write_text(content)
            sentence = f"{bad}: cannot be used ("
        with pytest.raises(GuardError) as raised:
            vlmguard.export(made / "model", tmp_path / "out", sign=bad)
        assert str(raised.value).startswith(sentence) and "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_without_the_package_the_extra_is_named(folder: Path, keys: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ExtraMissing) as raised:
        sign(folder, keys("ours")[0])
    assert str(raised.value) == f"signatures need model-signing; run: {install_command('sign')}"


def test_the_command_line(folder: Path, keys: Callable) -> None:
    private, public = map(str, keys("theirs"))
    done = CliRunner().invoke(cli.app, ["sign", str(folder), "--key", private])
    assert (done.exit_code, done.stdout) == (0, f"signed: {folder / 'model.sig'}\n")
    done = CliRunner().invoke(cli.app, ["verify", str(folder), "--verify-signature", public, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["checks"][0]["name"] == SIGNED
