"""Resumable stages: a folder that is written whole or not at all, beside the key of what it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

KEY_FILE = "stage.json"


def run_stage(folder: Path, key: Mapping[str, object], make: Callable[[Path], Mapping[str, object] | None]) -> Path:
    """Make `folder` with `make` unless it holds the result of the same `key`; returns the folder.

    `make` gets an empty folder beside the final one, and may return facts to record. Because the folder is renamed at
    the end, a stopped run leaves either the old result or the new one.
    """
    wanted = json.loads(json.dumps(key))
    if stage_record(folder).get("key") == wanted:
        print(f"{folder.name}: already made", flush=True)
        return folder
    print(f"{folder.name}: started", flush=True)
    started, cpu = time.perf_counter(), time.process_time()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    facts = make(partial) or {}
    spent = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    record = {"key": wanted, "facts": facts, **spent}
    (partial / KEY_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder.name}: finished in {spent['seconds']:.0f} s ({spent['cpu_seconds']:.0f} CPU s)", flush=True)
    return folder


def stage_record(folder: Path) -> dict[str, object]:
    """What `run_stage` recorded in a finished folder; empty where there is none."""
    path = folder / KEY_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def key_of(folder: Path) -> str:
    """A digest of what a finished stage was made from, for the keys of stages that use it."""
    return digest_of(stage_record(folder)["key"])


def digest_of(value: object) -> str:
    """A short SHA-256 of plain data, for keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
