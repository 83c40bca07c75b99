"""The command that messages give for a missing extra: it names this installation, and pip can run it."""

import json
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import get_args

import pytest

from vlmguard.graphs import extras
from vlmguard.graphs.extras import Extra, install_command

CHECKOUT = Path(__file__).resolve().parents[2]


def test_every_extra_of_the_package_has_a_name_here():
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["optional-dependencies"]
    assert set(get_args(Extra)) == set(declared)


def test_in_a_clone_the_command_names_the_clone():
    assert install_command("serve", "cpu") == f"pip install -e {shlex.quote(f'{CHECKOUT}[serve,cpu]')}"


def test_pip_runs_the_printed_command():
    """As printed, but for `--dry-run`, and without the network: the dependencies are not looked up."""
    pip, *arguments = shlex.split(install_command(*get_args(Extra)))
    assert pip == "pip"
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--dry-run", "--no-deps", "--no-build-isolation"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr  # pip's warning about a name that is not in pyproject.toml


@pytest.mark.parametrize(
    ("recorded", "command"),
    [
        (None, "pip install 'vlmguard[cpu]'"),
        (
            {"url": "https://example.com/v.git", "vcs_info": {"vcs": "git", "commit_id": "0123abcd"}},
            "pip install 'vlmguard[cpu] @ git+https://example.com/v.git@0123abcd'",
        ),
        (
            {"url": "file:///tmp/vlmguard-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install 'vlmguard[cpu] @ file:///tmp/vlmguard-0.1.0-py3-none-any.whl'",
        ),
    ],
)
def test_elsewhere_it_names_what_pip_recorded(monkeypatch, tmp_path, recorded, command):
    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return None if recorded is None else json.dumps(recorded)

    monkeypatch.setattr(extras, "_FOLDER", tmp_path)
    monkeypatch.setattr(extras, "distribution", lambda name: Installed())
    assert install_command("cpu") == command


def test_without_any_record_it_names_the_package(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "_FOLDER", tmp_path)
    monkeypatch.setattr(extras, "distribution", missing)
    assert install_command("cpu") == "pip install 'vlmguard[cpu]'"


def test_no_message_names_an_extra_by_itself():
    """Every sentence takes its command from `install_command`."""
    written = [
        path
        for folder in ("graphs", "runtime", "exporter", "apps", "plugins")
        for path in (CHECKOUT / folder).rglob("*.py")
    ]
    naming = [
        path.relative_to(CHECKOUT).as_posix()
        for path in [CHECKOUT / "cli.py", *written]
        if "vlmguard[" in path.read_text()
    ]
    assert naming == ["graphs/extras.py"]
