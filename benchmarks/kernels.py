"""Count the kernels that the guard adds to TensorRT-RTX engines. No GPU: the builder prints the layers of what it compiles.

    python benchmarks/kernels.py

The model is a LLaVA decoder of 4 layers with KV cache, random weights, float16, exported by vlmguard; every layer is guarded.
`report.py` writes the table in docs/tensorrt.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
from engine_profiles import DECODE, DECODE_OF_ONE_ROW, PREFILL
from guarding import write_directions
from measure import say
from record import parser, write_result
from shapes import SHAPES, llava_folder

from vlmguard.exporter.engines.build_engine import BuildOptions, build_engine
from vlmguard.exporter.engines.profile import EngineProfile, decoder_shapes
from vlmguard.graphs.anatomy import dissect
from vlmguard.graphs.directions import read_directions
from vlmguard.graphs.engine_plans import decode_step_plan, prompt_plan
from vlmguard.graphs.layouts import open_package
from vlmguard.graphs.modes import Mode, Positions
from vlmguard.graphs.package import ModelPackage
from vlmguard.graphs.planner import plan_guard
from vlmguard.graphs.rewrite import rewrite
from vlmguard.graphs.spec import GuardSpec
from vlmguard.graphs.tensorrt import settle_sizes
from vlmguard.runtime.tensorrt.backend import find_backend

RANK = 2
ROWS: tuple[tuple[str, Mode], ...] = (
    *(("rank1", mode) for mode in ("project", "steer", "restore", "supervise", "combined")),
    *(("lowrank", mode) for mode in ("restore", "supervise")),
    ("dense", "project"),
)


def main() -> None:
    args = parser("kernels", __doc__).parse_args()
    args.shape = "tiny"  # what is counted does not depend on the sizes
    shape = SHAPES[args.shape]
    _, model = llava_folder(shape, args.models)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "directions.safetensors"
        write_directions(path, shape.hidden_size, shape.num_hidden_layers, RANK)
        measured = _counted(open_package(model), path, args)
    backend = find_backend("tensorrt_rtx")
    about = {"layers": shape.num_hidden_layers, "rank": RANK, "builder": f"{backend.name} {backend.version}"}
    write_result(args, "kernels", {**about, **measured})


def _counted(package: ModelPackage, directions: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Kernels of the unguarded engines, and of each guard those that it adds."""
    both, apart = (PREFILL, DECODE), (PREFILL, DECODE, DECODE_OF_ONE_ROW)
    bare = _kernels(package.load_decoder(), package, both)
    separate = [_kernels(package.load_decoder(), package, (profile,))[0] for profile in apart]
    rows = []
    for lowering, mode in ROWS[:1] if args.quick else ROWS:
        row: dict[str, Any] = {"lowering": lowering, "mode": mode}
        for positions in ("all", "last"):
            guarded = _guarded(package, directions, lowering, mode, positions)
            row[f"one engine, {positions}"] = _added(_kernels(guarded, package, both), bare)
        guarded = _guarded(package, directions, lowering, mode, "last")
        step = _guarded(package, directions, lowering, mode, "last", step=True)
        graphs = (guarded, step, step)
        counts = [_kernels(graph, package, (profile,))[0] for graph, profile in zip(graphs, apart, strict=True)]
        row["two engines, last"] = _added(counts, separate)
        rows.append(row)
        say(f"{lowering} {mode}: {row}")
    return {"bare": bare, "bare_separate": separate, "rows": rows}


def _added(counts: Sequence[int], bare: Sequence[int]) -> list[int]:
    return [count - without for count, without in zip(counts, bare, strict=True)]


def _guarded(
    package: ModelPackage, directions: Path, lowering: str, mode: Mode, positions: str, step: bool = False
) -> ir.Model:
    model = package.load_decoder()
    anatomy = dissect(model, package.declared_layers)
    spec = GuardSpec(mode=mode, lowering=lowering, positions=cast(Positions, positions), **_numbers(mode))
    plan = plan_guard(model, anatomy, read_directions(directions), spec)
    plan = (decode_step_plan if step else prompt_plan)(plan) or plan
    rewrite(model, plan)
    return model


def _numbers(mode: Mode) -> dict[str, float]:
    """Those that directions of random numbers do not have."""
    tau = {} if mode == "project" else {"tau": 0.5}
    return tau | ({"alpha": 0.1} if mode in ("steer", "supervise") else {})


def _kernels(model: ir.Model, package: ModelPackage, profiles: Sequence[EngineProfile]) -> list[int]:
    """Layers that run on the device, by profile."""
    settle_sizes(model)
    heads = package.kv_heads, package.head_size
    shapes = [decoder_shapes(model.graph, profile, {}, heads) for profile in profiles]
    backend = find_backend("tensorrt_rtx")
    engine = build_engine(backend, model, package.decoder, shapes, BuildOptions(), lambda *_: None)
    return [engine.layers.of_profile(number).kernels for number in range(len(profiles))]


if __name__ == "__main__":
    main()
