"""Result files: what was measured, on which machine, with what; `report.py` reads nothing else."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from shapes import DEFAULT_MODELS, SHAPES

from vlmguard.graphs.clock import now

SCHEMA = "vlmguard.benchmark/1"
RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    *(
        "vlmguard",
        "onnxruntime",
        "onnxruntime-gpu",
        "onnxruntime-genai",
        "onnx",
        "onnx-ir",
        "torch",
        "transformers",
        "numpy",
        "fastapi",
        "uvicorn",
    ),
    *("tensorrt", "tensorrt-rtx-cu13"),
)


class ResultsUnusable(Exception):
    """Result files that are missing, foreign, or not measured in earnest."""


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs, measures nothing")
    options.add_argument("--seconds", type=float, help="longest time per group of sessions; default: each script's own")
    options.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="result file")
    options.add_argument("--models", type=Path, default=DEFAULT_MODELS, help="where models are kept between runs")
    options.add_argument("--shape", choices=tuple(SHAPES), default="qwen2.5-0.5b")
    options.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of every runtime; default: all cores"
    )
    return options


def write_result(args: argparse.Namespace, name: str, measured: Mapping[str, Any], part: str | None = None) -> None:
    """Write the result file; with `part` that part of it alone, the others stay as they were measured before.

    Each part carries its own machine, versions and date, because parts may be measured on different days.
    """
    kept = read_parts(args.out) if part is not None else {}
    about = {"quick": args.quick, "threads": args.threads, "machine": machine(), "versions": versions()}
    about["date"] = now().isoformat(timespec="minutes")
    kept[part or name] = {**about, **measured}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(".partial")
    temporary.write_text(json.dumps({"schema": SCHEMA, "name": name, "parts": kept}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(args.out)


def read_parts(path: Path) -> dict[str, Any]:
    """The parts of a result file; none if there is no such file.

    Raises:
        ResultsUnusable: the file is not one of ours.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ResultsUnusable(f"{path}: is not JSON ({error}); measure again") from None
    if found.get("schema") != SCHEMA:
        raise ResultsUnusable(f"{path}: has schema {found.get('schema')!r}, expected {SCHEMA}; measure again")
    return found["parts"]


def machine() -> dict[str, Any]:
    """What a reader needs to compare: processor, cores, memory, system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "ram_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 1),
    }


def versions() -> dict[str, str]:
    """Of Python and what is installed of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    """Linux says it in /proc; elsewhere whatever Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    vector = next((name for name in ("avx512f", "avx2", "avx") if name in flags), platform.machine())
    return f"{known[0] if known else platform.machine()} ({vector})"
