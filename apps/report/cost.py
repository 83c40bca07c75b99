"""The guard's cost: counted nodes and bytes; engine layers and latency from files with measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.manifest import read_manifest, require_intact
from ...graphs.node_builder import PREFIX
from ...graphs.strict_json import from_strict_json
from .subject import Subject

BENCHMARK_SCHEMA = "vlmguard.benchmark/1"
_LARGEST_FILE = 64 << 20  # bytes


@dataclass(frozen=True)
class EngineCost:
    """One optimisation profile of an engine: its layers, and the guard's nodes among them by decoder layer."""

    engine: str
    profile: str
    layers: int
    kernels: int
    guard_nodes: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Latency:
    """One measured variant: guarded against unguarded time of the same call.

    Attributes:
        part: precision and phase, as the benchmark names them.
        variant: the guard that was measured.
        shape: of the model that it was measured on, in words.
        ratio, low, high: median, and the spread that the benchmark gives; 1 is no cost.
        pairs: how many pairs of calls.
        machine, date: where and when.
    """

    part: str
    variant: str
    shape: str
    ratio: float
    low: float
    high: float
    pairs: int
    machine: str
    date: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Cost:
    """The guard's additions to the decoder.

    Attributes:
        nodes, nodes_added: number of nodes of the decoder without the guard, and of the guard.
        weights, weights_added: bytes of the decoder's weights without the guard, and of the guard's.
        rewritten: number of weights that contain the guard (lowering `fold`).
        engines, latency: empty without measurements.
    """

    nodes: int
    nodes_added: int
    weights: int
    weights_added: int
    rewritten: int
    engines: tuple[EngineCost, ...] = ()
    latency: tuple[Latency, ...] = ()

    def to_json(self) -> dict[str, Any]:
        shown = {name: [row.to_json() for row in getattr(self, name)] for name in ("engines", "latency")}
        return {**vars(self), **shown}


def cost_of(subject: Subject, engine: Path | None = None, benchmark: Path | None = None) -> Cost:
    """Count, and read what was measured.

    Args:
        engine: a folder of engines built from the subject's folder.
        benchmark: a result file of `benchmarks/inference.py`.

    Raises:
        GuardError: the engines are of another guard, or the benchmark's file cannot be used.
    """
    graph = subject.guarded.package.load_decoder().graph
    own = [value for name, value in graph.initializers.items() if name.startswith(PREFIX)]
    others = [value for name, value in graph.initializers.items() if not name.startswith(PREFIX)]
    if subject.sides.folded:
        others, own, rewritten = [*others, *own], [], len(own)
    else:
        rewritten = 0
    return Cost(
        nodes=subject.anatomy.nodes,
        nodes_added=sum((node.name or "").startswith(PREFIX) for node in graph.all_nodes()),
        weights=_bytes(others),
        weights_added=_bytes(own),
        rewritten=rewritten,
        engines=_engines(subject, engine) if engine is not None else (),
        latency=_latency(benchmark, subject.plan.mode) if benchmark is not None else (),
    )


def _bytes(values: list[ir.Value]) -> int:
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def _engines(subject: Subject, folder: Path) -> tuple[EngineCost, ...]:
    folder = folder.absolute()
    manifest = read_manifest(folder)
    if not manifest.engines:
        raise GuardError(f"{folder}: holds no engines; give the folder that `vlmguard engine` wrote")
    require_intact(folder, manifest, again=False)
    if manifest.plan != subject.manifest.plan:
        raise ManifestMismatch(f"{folder}: its engines carry another guard than {subject.folder}; build them again")
    return tuple(
        EngineCost(engine.path, profile["name"], found["layers"], found["kernels"], _by_layer(found["guard_nodes"]))
        for engine in manifest.engines
        for profile, found in zip(engine.profiles, engine.layers["profiles"], strict=True)
    )


def _by_layer(nodes: dict[str, int]) -> str:
    return ", ".join(f"layer {layer}: {count}" for layer, count in nodes.items())


def _latency(path: Path, mode: str) -> tuple[Latency, ...]:
    """The rows of the mode that the folder has, from every part."""
    unusable = f"{path}: is no result of benchmarks/inference.py"
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise GuardError(f"{unusable} ({path.stat().st_size} bytes); give such a file with --benchmark")
        content = from_strict_json(path.read_text(encoding="utf-8"))
        if content["schema"] != BENCHMARK_SCHEMA:
            raise GuardError(f"{unusable} (schema {content['schema']!r}, expected {BENCHMARK_SCHEMA!r}); measure again")
        parts: dict[str, Any] = content["parts"]
        if quick := [name for name, part in parts.items() if part["quick"]]:
            raise GuardError(f"{path}: {quick[0]} was run with --quick, which measures nothing; measure without it")
        rows = [
            _measured(name, part, row)
            for name, part in parts.items()
            for row in part["rows"]
            if "ratio" in row and row.get("mode") == mode
        ]
    except OSError as error:
        raise GuardError(f"{path}: cannot be read ({error.strerror}); give a result file with --benchmark") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise GuardError(f"{unusable} ({reason}); give such a file with --benchmark") from None
    if not rows:
        raise GuardError(f"{path}: measured no guard of mode {mode}; give a result that did, or leave --benchmark out")
    return tuple(rows)


def _measured(name: str, part: dict[str, Any], row: dict[str, Any]) -> Latency:
    spread = row["ratio"]
    return Latency(
        part=name,
        variant=str(row["name"]),
        shape=str(part["shape"]),
        ratio=float(spread["median"]),
        low=float(spread["low"]),
        high=float(spread["high"]),
        pairs=int(spread["count"]),
        machine=f"{part['machine']['cpu']}, {part['machine']['cores']} cores, {part['threads']} threads",
        date=str(part["date"]),
    )
