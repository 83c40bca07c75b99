"""Running somebody else's exporter: once per folder, whole or not at all, and without its chatter."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path


def export_once(folder: Path, export: Callable[[Path], None]) -> None:
    """Fill `folder` with `export`, unless it is there: whole or not at all, so a failed export is not found later."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="exporting-") as staging:
        target = Path(staging, "whole")
        target.mkdir()
        with quiet():
            export(target)
        target.rename(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk on stdout, stderr, in logs and warnings. What they said is told only when they fail."""
    said = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    except Exception as failure:
        failure.add_note(said.getvalue()[-4000:])
        raise
    finally:
        logging.disable(disabled)


def release(package: str) -> str:
    """A package and its installed version, as a `ZooModel` names its exporter."""
    return f"{package} {importlib.metadata.version(package)}"
