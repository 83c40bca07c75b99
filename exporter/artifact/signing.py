"""Sign a guarded folder and verify its signature: with a key pair, offline, by OpenSSF's `model-signing`.

Digests in a folder show that its files are consistent; an attacker who changes a file can change the digest as well. A
signature over all of them requires the private key. It is a file of the folder, `model.sig`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ...graphs.errors import ExtraMissing, GuardError, ManifestMismatch, first_line
from ...graphs.extras import install_command
from ...graphs.manifest import read_manifest, require_intact
from ...graphs.package import SIGNATURE_NAME
from ...graphs.proof.structure import Check, exact
from ...graphs.staging import write_file


def sign(folder: Path | str, private_key: Path | str) -> Path:
    """Sign a guarded folder that matches its manifest; an older signature is replaced.

    Args:
        folder: of graphs or of engines.
        private_key: an elliptic-curve key, PEM, without a password.

    Returns:
        The signature's file.

    Raises:
        ManifestMismatch: the folder differs from what was proved, so it must not be signed.
        GuardError: the key cannot be used.
        ExtraMissing: model-signing is not installed.
    """
    folder, key = Path(folder).absolute(), _key(private_key)
    _library()  # before anything is hashed
    require_intact(folder, read_manifest(folder))
    return write_signature(folder, key)


def require_key(private_key: Path | str) -> Path:
    """Ask early, before minutes of work, whether a folder can be signed at its end.

    Raises:
        GuardError, ExtraMissing: as for `sign`.
    """
    signing, _ = _library()
    key = _key(private_key)
    try:
        signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:  # of cryptography, of model_signing
        raise _unusable(key, error) from None
    return key


def write_signature(folder: Path, private_key: Path) -> Path:
    """Sign whatever the folder holds now."""
    signing, hashing = _library()
    path = folder / SIGNATURE_NAME
    try:
        with tempfile.TemporaryDirectory(
            prefix="vlmguard-"
        ) as apart:  # an older signature stays until this one is made
            made = Path(apart) / SIGNATURE_NAME
            config = signing.Config().use_elliptic_key_signer(private_key=private_key)
            config.set_hashing_config(_hashed(hashing)).sign(folder, made)
            content = made.read_bytes()
    except OSError as error:
        raise GuardError(
            f"{folder}: cannot be signed ({first_line(error)}); check its files and their permissions"
        ) from None
    except Exception as error:  # of cryptography, of model_signing
        raise _unusable(private_key, error) from None
    write_file(path, content)
    return path


def check_signature(folder: Path | str, public_key: Path | str) -> Check:
    """Whether the folder holds exactly the files that the private key's owner signed.

    Args:
        folder: a guarded folder.
        public_key: PEM, from a trusted source: never from the folder itself.

    Raises:
        ManifestMismatch: there is no signature, another key made it, or a file was added, removed or changed since.
        GuardError: the key cannot be used.
        ExtraMissing: model-signing is not installed.
    """
    folder, key = Path(folder).absolute(), _key(public_key)
    _, hashing = _library()
    from model_signing import verifying

    path = folder / SIGNATURE_NAME
    if not path.is_file():
        raise ManifestMismatch(
            f"{folder}: holds no {SIGNATURE_NAME}, so it is not signed; sign it with `vlmguard sign`"
        )
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise _unusable(key, error) from None
    try:
        config.set_hashing_config(_hashed(hashing)).verify(folder, path)
    except Exception as error:  # a mismatch is a ValueError, another key's signature one of cryptography's own
        raise ManifestMismatch(
            f"{folder}: is not what the owner of {key.name} signed ({first_line(error)}); do not use it"
        ) from None
    files = sum(1 for file in folder.rglob("*") if file.is_file() and file != path)
    return exact("every file is what the key's owner signed", files, [])


def _hashed(hashing: Any) -> Any:
    """Every file but the signature, links followed (`--data reference` makes some)."""
    return hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME]).set_allow_symlinks(True)


def _library() -> tuple[Any, Any]:
    try:
        from model_signing import hashing, signing
    except ImportError:
        raise ExtraMissing(f"signatures need model-signing; run: {install_command('sign')}") from None
    return signing, hashing


def _key(path: Path | str) -> Path:
    key = Path(path).absolute()
    if not key.is_file():
        raise GuardError(f"{key}: no such key file; name an elliptic-curve key in PEM")
    return key


def _unusable(key: Path, error: Exception) -> GuardError:
    return GuardError(
        f"{key}: cannot be used ({first_line(error)}); name an elliptic-curve key in PEM, without a password"
    )
