"""`build_engines`: from a guarded folder of ONNX graphs to a guarded folder of TensorRT engines.

    guarded folder ──► parts (decoder, vision encoder, embeddings) ──► readable? ──► profiles ──► build ──► guard in the layers?
                   ──► (run, where a GPU is) ──► folder (engines, tokenizer and configs, guard.json)

The input is a folder that `vlmguard-export` wrote, so what goes into the builder is what was proved. Decode steps get an engine
of their own where their guard can be cheaper. The graphs of both engines are derived from the folder's decoder and proved here
(`engine_graphs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from ...graphs.clock import now, to_text
from ...graphs.digests import sha256_file
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.graph_io import external_files, load_graph
from ...graphs.manifest import (
    EngineRecord,
    Manifest,
    hash_files,
    read_manifest,
    require_intact,
    write_manifest,
)
from ...graphs.new_files import create_file
from ...graphs.node_builder import PREFIX
from ...graphs.package import ModelPackage
from ...graphs.pairs import reads_pairs
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.roles import input_roles
from ...graphs.staging import bring, require_writable, staged
from ...graphs.tensorrt import require_readable, settle_sizes
from ...runtime.decoder_inputs import can_pad
from ...runtime.guarded import open_guarded_package
from ...runtime.tensorrt.backend import Backend, find_backend
from ..artifact.guarded_folder import versions
from ..proof.prove_decoder import require_all
from ..sources import require_apart
from .build_engine import BuildOptions, Engine, build_engine, require_capabilities
from .engine_graphs import DERIVED, DecoderRole, EngineGraph, derive_engine_graph, prove_engine_graph
from .layers import require_guard
from .profile import (
    EngineProfile,
    Shapes,
    decoder_shapes,
    default_profiles,
    parse_shapes,
    part_shapes,
    require_within,
    shapes_to_json,
)

ENGINE_SUFFIX = ".engine"
Role = Literal["decoder", "decode_step", "vision_encoder", "embed_tokens"]


@dataclass(frozen=True)
class Part:
    """One graph on its way to an engine.

    Attributes:
        role: which part of the model.
        path: the graph's file.
        relative: the engine's file, relative to the folder.
        profiles: the name and the shapes of each optimisation profile.
        guard: names of the guard's nodes in its layers that an engine has to show.
        pads: of a decoder: whether rows of different lengths may share a batch.
        settled: whether the file writes fixed sizes as names, which our builder puts right before TensorRT reads them.
        derived: the graph that is built in place of the file's; `None`: the file's.
    """

    role: Role
    path: Path
    relative: str
    profiles: tuple[tuple[str, dict[str, Shapes]], ...]
    guard: tuple[str, ...] = ()
    pads: bool = False
    settled: bool = False
    derived: EngineGraph | None = None


@dataclass(frozen=True)
class EngineResult:
    """Result of `build_engines`.

    Attributes:
        out: the folder.
        manifest: its `guard.json`.
        warnings: what the builder warned of, by engine.
    """

    out: Path
    manifest: Manifest
    warnings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "proved": self.manifest.proved,
            "engines": [engine.model_dump() for engine in self.manifest.engines],
            "warnings": {name: list(texts) for name, texts in self.warnings.items()},
        }


def build_engines(
    guarded: Path | str,
    out: Path | str | None = None,
    *,
    backend: str | None = None,
    profiles: Sequence[EngineProfile] = (),
    shapes: Sequence[str] = (),
    options: BuildOptions | None = None,
    single_engine: bool = False,
    force: bool = False,
    report_progress: ProgressCallback = ignore_progress,
) -> EngineResult:
    """Build the engines of a guarded folder.

    Args:
        guarded: a folder written by `vlmguard-export`, with a guard that was proved in the model or on its own.
        out: the folder to write; default `<name>-engine` beside it.
        backend: `tensorrt` or `tensorrt_rtx`; `None`: the first that is installed.
        profiles: shapes of the decoder's calls; default `default_profiles`.
        shapes: shapes of inputs without a profile (`parse_shapes`).
        options: options of the builder.
        single_engine: one engine for prefill and decode, which keeps the weights once but has more kernels per decode step.
        force: replace OUT.
        report_progress: called with `(stage, done, total)`.

    Raises:
        GuardError: anything wrong with the request or its files, or TensorRT refuses; nothing was written.
    """
    options = options or BuildOptions()
    folder = Path(guarded).absolute()
    chosen = find_backend(backend)
    require_capabilities(chosen, options.capabilities)
    manifest, package = open_buildable(folder)
    target = Path(out).absolute() if out is not None else folder.parent / f"{folder.name}-engine"
    require_apart(target, folder, package)
    require_writable(target, force)
    graphs = _proved_graphs(folder, manifest, package, single_engine, report_progress)
    parts = plan_parts(package, profiles, parse_shapes(shapes), graphs)
    created = to_text(now())
    with staged(target, force) as stage:
        engines = [_build(chosen, part, options, stage, report_progress) for part in parts]
        _bring_companions(package, parts, stage)
        records = [_record(chosen, part, engine, options) for part, engine in zip(parts, engines, strict=True)]
        written = _record_folder(stage, manifest, records, chosen, created)
    warnings = {part.relative: engine.warnings for part, engine in zip(parts, engines, strict=True) if engine.warnings}
    return EngineResult(target, written, warnings)


def _proved_graphs(
    folder: Path, manifest: Manifest, package: ModelPackage, single_engine: bool, report_progress: ProgressCallback
) -> dict[DecoderRole, EngineGraph]:
    label = "proving the engines' graphs"
    roles: tuple[DecoderRole, ...] = ("decoder",) if single_engine else ("decoder", "decode_step")
    graphs: dict[DecoderRole, EngineGraph] = {}
    for number, role in enumerate(roles):
        report_progress(label, number, len(roles))
        graph = derive_engine_graph(folder, manifest, package, role)
        if graph is not None:
            graphs[role] = replace(graph, proof=prove_engine_graph(graph))
            require_all(graphs[role].proof)
    report_progress(label, len(roles), len(roles))
    return graphs


def open_buildable(folder: Path) -> tuple[Manifest, ModelPackage]:
    """A guarded folder that engines can be built from.

    Raises:
        ManifestMismatch: it is not guarded, not intact, not proved, has knobs, or holds engines.
    """
    manifest = read_manifest(folder)
    require_intact(folder, manifest, again=False)
    if manifest.engines:
        raise ManifestMismatch(
            f"{folder}: holds engines already; give the guarded ONNX folder that they were built from"
        )
    if manifest.proved == "structure":
        raise ManifestMismatch(
            f"{folder}: only the structure of its guard was proved; run `vlmguard verify --run --source MODEL` on it first"
        )
    if manifest.plan.get("knobs"):
        raise ManifestMismatch(
            f"{folder}: its graph has knobs, and an engine has no inputs with defaults, so the caller could switch the "
            "guard off; export it again without --knobs"
        )
    return manifest, open_guarded_package(folder, manifest)


def plan_parts(
    package: ModelPackage,
    profiles: Sequence[EngineProfile],
    given: Mapping[str, Shapes],
    derived: Mapping[DecoderRole, EngineGraph] | None = None,
) -> tuple[Part, ...]:
    """The graphs to build, with the shapes of every input; raises before anything is built.

    Args:
        package: the model.
        profiles: shapes of the decoder's calls; none: `default_profiles`.
        given: shapes of other inputs.
        derived: the graphs of the decoder's engines, where they are not the package's own; that of `decode_step` is for the
            profiles with one token per call, where there are others too.

    Raises:
        GuardError: TensorRT cannot read one of the graphs, or the shapes do not fit.
    """
    derived = derived or {}
    graphs: dict[Role, Path | None] = {
        "decoder": package.decoder,
        "vision_encoder": package.vision_encoder,
        "embed_tokens": package.embed_tokens,
    }
    loaded: dict[Role, tuple[Path, ir.Model]] = {
        role: (path, load_graph(path, trust_links=True)) for role, path in graphs.items() if path is not None
    }
    for path, model in loaded.values():
        require_readable(model, str(path))
    settled = {role: bool(settle_sizes(model)) for role, (_, model) in loaded.items()}
    decoder = loaded["decoder"][1].graph
    limit, caches = package.longest_sequence, bool(input_roles(decoder).states)
    pairs = reads_pairs(loaded["decoder"][1])
    chosen = tuple(profiles) or default_profiles(limit, caches, pairs)
    require_within(chosen, limit)
    if pairs and all(profile.batch.largest < 2 for profile in chosen):
        raise GuardError(
            f"{package.decoder}: its guard reads pairs of rows, and no profile has 2; write it as prefill:batch=1:2:2,..."
        )
    unknown = given.keys() - {value.name for _, model in loaded.values() for value in model.graph.inputs}
    if unknown:
        raise GuardError(
            f"--shape names {sorted(unknown)[0]!r}, which no graph of {package.root} takes; look at its inputs"
        )
    steps = [profile for profile in chosen if profile.is_step] if "decode_step" in derived else []
    longer = [profile for profile in chosen if profile not in steps]
    if not steps or not longer:
        steps, longer = [], list(chosen)
    parts: list[Part] = []
    for role, (path, model) in loaded.items():
        graph = derived.get("decoder") if role == "decoder" else None
        of_role = longer if role == "decoder" else chosen
        part = _part(package, role, path, model if graph is None else graph.model, of_role, given)
        parts.append(replace(part, settled=settled[role], derived=graph))
    if steps:
        graph = derived["decode_step"]
        part = _part(package, "decode_step", package.decoder, graph.model, steps, given)
        parts.insert(1, replace(part, settled=settled["decoder"], derived=graph))
    return tuple(parts)


def _part(
    package: ModelPackage,
    role: Role,
    path: Path,
    model: ir.Model,
    profiles: Sequence[EngineProfile],
    given: Mapping[str, Shapes],
) -> Part:
    suffix = f".decode{ENGINE_SUFFIX}" if role == "decode_step" else ENGINE_SUFFIX
    relative = path.relative_to(package.root).with_suffix(suffix).as_posix()
    is_decoder = role in ("decoder", "decode_step")
    try:
        if is_decoder:
            heads = package.kv_heads, package.head_size
            shapes = tuple((one.name, decoder_shapes(model.graph, one, given, heads)) for one in profiles)
        else:
            shapes = ((role, part_shapes(model.graph, profiles, given)),)
    except GuardError as error:
        raise GuardError(f"{path}: {error}") from None
    guard = tuple(node.name or "" for node in model.graph.all_nodes() if _must_show(node))
    pads = is_decoder and can_pad(model.graph)
    return Part(role, path, relative, shapes, guard, pads)


# Operators that the builder turns into addressing, or drops if they change nothing (alpha 1).
_ADDRESSING = frozenset({"Gather", "GatherND", "Slice", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Concat", "Cast"})


def _must_show(node: ir.Node) -> bool:
    """Whether a node of the guard is arithmetic, which an engine that has the guard shows in some layer."""
    if not (node.name or "").startswith(f"{PREFIX}layer_") or node.op_type in _ADDRESSING:
        return False
    constants = [
        value.const_value.numpy() for value in node.inputs if value is not None and value.const_value is not None
    ]
    return not (node.op_type == "Mul" and any(bool((constant == 1).all()) for constant in constants))


def _build(
    backend: Backend, part: Part, options: BuildOptions, stage: Path, report_progress: ProgressCallback
) -> Engine:
    label = f"building {part.relative}"

    def report_phase(phase: str, done: int, total: int) -> None:
        report_progress(f"{label}: {phase}", done, total)

    report_progress(label, 0, 1)
    if part.derived is not None:
        model = part.derived.model
    else:
        model = load_graph(part.path, trust_links=True)
        settle_sizes(model)
    engine = build_engine(backend, model, part.path, [shapes for _, shapes in part.profiles], options, report_phase)
    if part.role in ("decoder", "decode_step"):
        require_guard(engine.layers, part.guard, len(part.profiles), str(part.path))
    destination = stage / part.relative
    destination.parent.mkdir(parents=True, exist_ok=True)
    create_file(destination, engine.plan)
    report_progress(label, 1, 1)
    return engine


def _bring_companions(package: ModelPackage, parts: Sequence[Part], stage: Path) -> None:
    """Tokenizer, configs, templates; no graph and no weights: those are in the engines."""
    graphs = {part.path for part in parts} | {path for path, _ in package.files() if path.suffix == ".onnx"}
    unwanted = graphs | {data for path in graphs for data in external_files(path)}
    for path, relative in package.files():
        if path not in unwanted:
            bring(path, stage / relative, "copy")


def _record(backend: Backend, part: Part, engine: Engine, options: BuildOptions) -> EngineRecord:
    derived = {} if part.derived is None else {DERIVED: engine.graph_sha256}
    return EngineRecord(
        path=part.relative,
        role=part.role,
        source={"graph": part.path.name, "sha256": sha256_file(part.path), **derived},
        backend=backend.name,
        version=backend.version,
        capabilities=list(options.capabilities),
        profiles=[{"name": name, "shapes": shapes_to_json(shapes)} for name, shapes in part.profiles],
        layers=engine.layers.to_json(),
        pads=part.pads,
        proof=[] if part.derived is None else [check.to_json() for check in part.derived.proof],
    )


def _record_folder(
    stage: Path, source: Manifest, engines: list[EngineRecord], backend: Backend, created: str
) -> Manifest:
    """The guarded folder's manifest with the engines in place of the graphs. The proof covers the graph; the engine is proved
    once it has run."""
    manifest = source.model_copy(
        update={
            "created": created,
            "files": hash_files(stage),
            "decoders": source.decoders[:1],
            "proved": "structure",
            "proved_because": "the engines have not been run yet",
            "versions": {**versions(), backend.name: backend.version},
            "engines": engines,
        }
    )
    write_manifest(stage, manifest)
    return manifest
