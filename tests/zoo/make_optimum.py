"""Makes and keeps the zoo's optimum graphs: `python tests/zoo/make_optimum.py FOLDER`, then `VLMGUARD_OPTIMUM=FOLDER`.

optimum-onnx 0.1.0 needs transformers 4.57, the zoo's torch side has 5.x: optimum gets an environment of its own, made here
on first use. The tiny checkpoints are written by THIS environment and read by both, so that both have the same weights.

    FOLDER/venv                 optimum's environment (or give one with --venv)
    FOLDER/checkpoints/FAMILY   what both environments load
    FOLDER/graphs/NAME          what optimum wrote, and versions.json

What is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.optimum import FOLDER_VARIABLE, GRAPHS, checkpoint_model

LOCKS = Path(__file__).resolve().parents[2] / "requirements"
# torch first, as in the Makefile: a plain `torch` downloads gigabytes of CUDA where only a CPU is wanted.
PACKAGES_IN_ORDER = (
    ("-r", str(LOCKS / "torch.txt")),
    ("--no-deps", "--require-hashes", "-r", str(LOCKS / "optimum.txt")),
)
PACKAGES = ("optimum-onnx", "optimum", "transformers", "torch", "onnx")
EXPORT = Path(__file__).with_name("optimum_export.py")


def make_environment(folder: Path) -> Path:
    """The environment's python."""
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in PACKAGES_IN_ORDER:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def write_checkpoint(family: str, folder: Path) -> None:
    if not folder.exists():
        checkpoint_model(family).save_pretrained(folder)


def write_graph(python: Path, checkpoint: Path, out: Path, arguments: tuple[str, ...]) -> None:
    """Whole or not at all, so that a failed export is not found later."""
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="exporting-") as staging:
        target = Path(staging, "whole")
        # -P: else the script's folder comes first on sys.path, and `optimum` is the zoo's own module.
        command = [str(python), "-P", str(EXPORT), str(checkpoint), str(target), *arguments]
        done = subprocess.run(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{out.name}: optimum failed\n{done.stderr[-4000:]}")
        versions = f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {PACKAGES}}}))"
        told = subprocess.run([str(python), "-c", versions], capture_output=True, text=True, check=True)
        (target / "versions.json").write_text(json.dumps(json.loads(told.stdout), indent=2) + "\n", encoding="utf-8")
        target.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--venv", type=Path, help="an environment with optimum-onnx; made in FOLDER/venv by default")
    asked = parser.parse_args()
    folder = asked.folder.absolute()
    python = make_environment((asked.venv or folder / "venv").absolute())
    for name, graph in GRAPHS.items():
        checkpoint = folder / "checkpoints" / graph.family
        write_checkpoint(graph.family, checkpoint)
        write_graph(python, checkpoint, folder / "graphs" / name, graph.arguments)
        print(folder / "graphs" / name)
    print(f"export {FOLDER_VARIABLE}={folder}")


if __name__ == "__main__":
    main()
