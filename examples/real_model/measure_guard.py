"""Measure a guard on the test bed: `python measure_guard.py --data FOLDER [-- OPTIONS]` exports it and asks both models.

1. `onnx`       the checkpoint converted by `vlmguard convert`, once                     (stage of `seed-N`)
2. `guarded`    `vlmguard-export` of that, timed; OPTIONS are its options, none by default
3. cells        held-out prompts in every setting, to the unguarded and the guarded model  (cells.py)

The results are `measured/NAME.json` below `seed-N`; `page.py` writes docs/real-model.md from them. A stopped run goes
on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from build import BUILD
from cells import all_cells, ask_cell, random_tokens
from sets import read_sets
from stages import digest_of, key_of, run_stage, stage_record

from vlmguard.exporter.sources import open_model
from vlmguard.runtime.guarded import GuardedVLM

LIBRARIES = ("torch", "transformers", "onnxruntime", "numpy")


def measure(
    seed_folder: Path, data: Path, name: str, options: Sequence[str], count: int, guarded: Path | None = None
) -> Path:
    """Export (unless `guarded` is given) and ask; returns the file with the results.

    Args:
        seed_folder: what `build.py` printed.
        name: of this guard, for its files.
        options: of `vlmguard-export`.
        count: prompts a cell.
    """
    checkpoint, seed = seed_folder / "checkpoint", stage_record(seed_folder / "safety")["key"]["seed"]
    onnx = run_stage(
        seed_folder / "onnx", {"checkpoint": key_of(checkpoint)}, lambda folder: convert(checkpoint, folder)
    )
    if guarded is None:
        key = {"onnx": key_of(onnx), "options": list(options)}
        record = run_stage(seed_folder / "guarded" / name, key, lambda folder: export(onnx / "model", folder, options))
        guarded, exported = record / "model", stage_record(record)["facts"]
    else:
        exported = {"options": None}
    if not (guarded / "guard.json").is_file():
        return write_results(seed_folder, name, {"seed": seed, "exported": exported, "cells": {}})
    key = {
        "guard": digest_of(json.loads((guarded / "guard.json").read_text())),
        "images": key_of(seed_folder / "images"),
        "count": count,
    }
    path = results_path(seed_folder, name)
    results = json.loads(path.read_text()) if path.is_file() else {}
    if results.get("key") != key:
        results = {"key": key, "seed": seed, "cells": {}}
    plan = json.loads((guarded / "guard.json").read_text())["decoders"][0]["plan"]
    results |= {
        "exported": exported,
        "plan": {"mode": plan["mode"], "layers": plan["layers"], "rank": max(site["rank"] for site in plan["sites"])},
        "machine": machine(),
        "recipe": stage_record(seed_folder / "safety")["facts"]["recipe"],
    }
    base, vlm = open_model(onnx / "model"), GuardedVLM.open(guarded)
    shown = base.blank_image(), random_tokens(base)
    for cell in all_cells(read_sets(data), seed_folder / "images" / "evaluation", *shown, count, 0):
        if cell.name in results["cells"]:
            continue
        started = time.perf_counter()

        def progress(done: int, cell: Any = cell, started: float = started) -> None:
            print(f"  {cell.name}: {done}/{len(cell.requests)}, {time.perf_counter() - started:.0f} s", flush=True)

        results["cells"][cell.name] = ask_cell(cell, base, vlm, progress)
        write_results(seed_folder, name, results)
    return path


def results_path(seed_folder: Path, name: str) -> Path:
    """Where the results of a guard are."""
    return seed_folder / "measured" / f"{name}.json"


def write_results(seed_folder: Path, name: str, results: dict[str, Any]) -> Path:
    """Replace the results of a guard, whole."""
    path = results_path(seed_folder, name)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def convert(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """The unguarded graphs, in `folder/model`."""
    cost = run([*command("vlmguard"), "convert", str(checkpoint), str(folder / "model")])
    if cost["exit_code"]:
        raise SystemExit(cost["exit_code"])
    return cost


def export(onnx: Path, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """A guarded folder, in `folder/model`, and what it cost; a refusal is a result too."""
    cost = run([*command("vlmguard-export"), str(onnx), str(folder / "model"), *options])
    decoder = sum(path.stat().st_size for path in (onnx / "onnx").glob("decoder_model_merged.onnx*"))
    return {"options": list(options), "decoder_bytes": decoder, **cost}


def command(name: str) -> list[str]:
    """A command of the package, run by this Python."""
    entry = {"vlmguard": "main", "vlmguard-export": "main_export"}[name]
    return [sys.executable, "-c", f"from vlmguard.cli import {entry}; {entry}()"]


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run a command; exit code, last line of its messages, seconds, CPU seconds, peak memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    last = ""
    for line in process.stderr:
        print(f"  {line.rstrip()}", flush=True)
        last = line.strip() or last
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "exit_code": process.returncode,
        "message": last if process.returncode else "",
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = next(
        (line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.machine()
    )
    return {
        "processor": model,
        "cores": cores,
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder with the public prompt sets.")
    parser.add_argument("--seed", type=int, default=0, help="Which bed.")
    parser.add_argument("--build", type=Path, default=BUILD, help="Build folder of build.py.")
    parser.add_argument("--name", default="default", help="Name of this guard's results.")
    parser.add_argument("--guarded", type=Path, help="Measure this guarded folder; export nothing.")
    parser.add_argument("--prompts", type=int, default=48, help="Prompts a cell.")
    parser.add_argument("--again", action="store_true", help="Export and measure again what was measured before.")
    parser.add_argument("options", nargs="*", help="Options of vlmguard-export, after --.")
    given = parser.parse_args()
    seed_folder = given.build / f"seed-{given.seed}"
    if given.again:
        shutil.rmtree(seed_folder / "guarded" / given.name, ignore_errors=True)
        results_path(seed_folder, given.name).unlink(missing_ok=True)
    print(measure(seed_folder, given.data, given.name, given.options, given.prompts, given.guarded))


if __name__ == "__main__":
    main()
