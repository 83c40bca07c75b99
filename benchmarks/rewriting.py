"""What a rewrite costs: time, memory and disk, on a 13.2 GB float16 decoder of 32 layers whose weights are a sparse file, and
what a whole export by default costs, its proof included: on that decoder, and on a 1 GB one whose weights are inside its file.

    python benchmarks/rewriting.py               # ours, without and with digests
    python benchmarks/rewriting.py --compare     # also onnx and onnx_ir, load + save: 13 GB of memory and of disk, minutes

Each run is a process of its own, one at a time. `wall` is what a person waits, from starting Python to its end; `work` leaves
the start and the imports out. Memory is the process's own peak. Written is what the output folder adds to the disk: blocks
of files that are not hard links of the source's. Zeros are hashed as slowly as any other bytes, but they are read from no
disk: the digests' speed is that of the processor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Spread, say
from record import parser, write_result
from shapes import wide_decoder

# Layers, width, MLP, vocabulary: Llama-2-7B's, and one to see that the script runs.
SIZES = {"wide": (32, 4096, 11008, 32000), "tiny": (4, 256, 512, 512)}
INSIDE = {"wide": (9, 2048, 5504, 32000), "tiny": (2, 256, 512, 512)}  # of the decoder with its weights inside: 1.04 GB
DEFAULT, DEFAULT_INSIDE = "export by default", "export by default, weights inside"
RUNS = {"export": 5, "export with digests": 2, DEFAULT: 1, DEFAULT_INSIDE: 1, "onnx": 1, "onnx_ir": 1}
OURS, OTHERS = ("export", "export with digests", DEFAULT, DEFAULT_INSIDE), ("onnx", "onnx_ir")


def main() -> None:
    options = parser("rewriting", __doc__)
    options.add_argument("--compare", action="store_true", help="also onnx and onnx_ir, load + save")
    options.add_argument("--only", action="append", choices=RUNS, help="only this row; may be given several times")
    options.add_argument("--child", nargs=3, metavar=("WHAT", "MODEL", "OUT"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child:
        print(json.dumps(_child(*args.child)))
        return
    size = "tiny" if args.shape == "tiny" else "wide"
    args.models.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".rewriting-", dir=args.models))
    try:
        claimed = wide_decoder(work / "model", *SIZES[size])
        _write_directions(work / "directions.safetensors", *SIZES[size][:2])
        _make_inside(work / "inside", INSIDE[size])
        for what in args.only or (*OURS, *(OTHERS if args.compare else ())):
            source = work / ("inside" if what == DEFAULT_INSIDE else "model")
            if what == DEFAULT_INSIDE:
                inside = (source / "model.onnx").stat().st_size
                about = {"bytes": inside, "layers": INSIDE[size][0], "width": INSIDE[size][1]}
            else:
                about = {"bytes": claimed, "layers": SIZES[size][0], "width": SIZES[size][1]}
            say(f"rewriting: {what}, {about['bytes'] / 1e9:.1f} GB")
            found = measure(what, source, work / "out", 1 if args.quick else RUNS[what])
            write_result(args, "rewriting", {**about, **found}, what)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(what: str, source: Path, out: Path, runs: int) -> dict[str, Any]:
    """Medians over `runs` fresh processes."""
    found = []
    for _ in range(runs):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, __file__, "--child", what, str(source / "model.onnx"), str(out)]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"{what} failed:\n{done.stderr[-2000:]}")
        found.append({"wall": wall, **json.loads(done.stdout), "written": written(source, out)})
        say(f"  {wall:.2f} s, of it work {found[-1]['work']:.2f} s; {found[-1]['peak'] / 1e6:.0f} MB peak")
    return {
        "runs": runs,
        **{key: Spread.of(_column(found, key)).to_json() for key in ("wall", "work")},
        **{key: max(one[key] for one in found) for key in ("peak", "written")},
        "proved": found[-1]["proved"],
    }


def _column(found: list[dict[str, Any]], key: str) -> Any:
    import numpy as np

    return np.array([one[key] for one in found])


def written(source: Path, out: Path) -> int:
    """Bytes on disk of the files of `out` that are not the source's own, under another name."""
    known = {path.stat().st_ino for path in source.rglob("*")}
    files = [path.stat() for path in out.rglob("*") if path.is_file()]
    return sum(status.st_blocks * 512 for status in files if status.st_ino not in known)


def _write_directions(path: Path, layers: int, width: int) -> None:
    """In a process of its own, like all the rest: this one stays small, because a child's peak may count its parent's."""
    _in_python(
        "from pathlib import Path; from guarding import write_directions; "
        f"write_directions(Path({str(path)!r}), {width}, {layers}, rank=4)"
    )


def _make_inside(folder: Path, size: tuple[int, int, int, int]) -> None:
    """A decoder whose weights, zeros, are inside its one file; its directions beside it."""
    wide_decoder(folder, *size)
    _in_python(f"import onnx; onnx.save(onnx.load({str(folder / 'model.onnx')!r}), {str(folder / 'model.onnx')!r})")
    (folder / "model.onnx.data").unlink()
    _write_directions(folder / "directions.safetensors", *size[:2])


def _in_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


# In the child


def _child(what: str, model: str, out: str) -> dict[str, Any]:
    work, proved = CHILDREN[what](Path(model), Path(out))
    return {"work": work, "proved": proved, "peak": _peak_bytes()}


def _export(model: Path, out: Path, digests: bool = False, proof: str = "structure") -> tuple[float, str]:
    from vlmguard.exporter.pipeline import export
    from vlmguard.graphs.spec import GuardSpec

    began = time.perf_counter()
    places = (folder / "directions.safetensors" for folder in (model.parent, model.parent.parent))
    directions = next(path for path in places if path.is_file())
    result = export(model, out, spec=GuardSpec(mode="restore"), directions=directions, digests=digests, proof=proof)
    taken = time.perf_counter() - began
    assert result.report is not None and len(result.report.layers) == result.anatomy.layer_count, result.report
    return taken, f"{result.proved.level}: {result.proved.why}"


def _onnx(model: Path, out: Path) -> tuple[float, str]:
    import onnx

    began = time.perf_counter()
    out.mkdir()
    loaded = onnx.load(model)
    onnx.save_model(loaded, out / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    return time.perf_counter() - began, ""


def _onnx_ir(model: Path, out: Path) -> tuple[float, str]:
    import onnx_ir

    began = time.perf_counter()
    out.mkdir()
    onnx_ir.save(onnx_ir.load(model), out / "model.onnx", external_data="model.onnx.data")
    return time.perf_counter() - began, ""


CHILDREN: dict[str, Callable[[Path, Path], tuple[float, str]]] = {
    "export": _export,
    "export with digests": lambda model, out: _export(model, out, digests=True),
    DEFAULT: lambda model, out: _export(model, out, digests=True, proof="auto"),
    DEFAULT_INSIDE: lambda model, out: _export(model, out, digests=True, proof="auto"),
    "onnx": _onnx,
    "onnx_ir": _onnx_ir,
}


def _peak_bytes() -> int:
    """Peak resident memory of this program alone; `ru_maxrss` would include what its parent held when it forked."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
