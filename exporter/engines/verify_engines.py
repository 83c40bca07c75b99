"""`verify` for a folder of engines: from its manifest alone, against the guarded graphs, and by running where a GPU is.

An engine cannot be read back as a graph. What ties it to a proof is a chain: the guarded graph was proved, its digest is in
the engine's record, the builder showed every node of the guard, and on the GPU the engine gives what ONNX Runtime gives for
that graph on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...graphs.anatomy import DecoderAnatomy, dissect
from ...graphs.digests import sha256_file
from ...graphs.errors import ManifestMismatch
from ...graphs.graph_content import is_graph
from ...graphs.inventory import is_read
from ...graphs.manifest import EngineRecord, Manifest, read_manifest
from ...graphs.package import ModelPackage
from ...graphs.plan import COORDINATES_OUTPUT
from ...graphs.progress import ProgressCallback
from ...graphs.proof.strip import strip_guard
from ...graphs.proof.structure import Check, exact
from ...runtime.decoder import DecoderSession, open_decoder
from ...runtime.guarded import GuardedVLM, open_guarded_package
from ..proof.compare import Comparison, relative
from ..proof.inputs import ProofInputs
from ..proof.limits import TOLERANCE
from ..proof.make_inputs import make_proof_inputs
from ..proof.prove_closed import roll
from ..session import Session
from ..sources import Source
from .engine_graphs import check_engine_graphs

# Prefill, and as many decode steps.
STEPS = 16


def check_records(manifest: Manifest) -> list[Check]:
    """The builder showed the guard in every layer that the plan guards."""
    checks = []
    for engine in manifest.engines:
        if not engine.is_decoder:
            continue
        shown = [profile.get("guard_nodes", {}) for profile in engine.layers.get("profiles", ())]
        wrong = [
            f"layer {layer} in profile {number}"
            for number in range(len(engine.profiles))
            for layer in manifest.plan.get("layers", ())
            if number >= len(shown) or not shown[number].get(str(layer))
        ]
        compared = sum(sum(profile.values()) for profile in shown)
        checks.append(exact("the builder showed the guard's nodes in every guarded layer", compared, wrong))
    return checks


def check_sources(manifest: Manifest, guarded: Path) -> list[Check]:
    """Every engine was built from the graph that has its role in that folder, and what lies around them is that folder's."""
    source = read_manifest(guarded)
    package = open_guarded_package(guarded, source)
    parts = {
        "decoder": package.decoder,
        "decode_step": package.decoder,
        "vision_encoder": package.vision_encoder,
        "embed_tokens": package.embed_tokens,
    }
    wrong = []
    for engine in manifest.engines:
        path = parts[engine.role]
        if path is None:
            raise ManifestMismatch(
                f"{guarded}: holds no {engine.role}, which {engine.path} was built from; give the folder that it was built from"
            )
        if sha256_file(path) != engine.source["sha256"]:
            wrong.append(engine.path)
    checks = [exact("every engine was built from the guarded folder's graph", len(manifest.engines), wrong)]
    return checks if wrong else [*checks, *check_engine_graphs(manifest, guarded, source, package)]


def check_around_engines(manifest: Manifest, guarded: Path) -> Check:
    """Tokenizer, templates and configs are those of the guarded folder that the engines were built from."""
    theirs = read_manifest(guarded).files
    engines = {engine.path for engine in manifest.engines}
    here = {name: record.sha256 for name, record in manifest.files.items() if name not in engines}
    wrong = [name for name, digest in here.items() if name not in theirs or theirs[name].sha256 != digest]
    wrong += [
        f"{name} is missing"
        for name in theirs
        if name not in here and is_read(guarded / name, name) and _is_text(guarded / name)
    ]
    return exact("files around the engines are the guarded folder's", len(here), wrong)


def _is_text(path: Path) -> bool:
    return not is_graph(path) and path.suffix != ".safetensors"


def check_by_running(folder: Path, manifest: Manifest, guarded: Path, report_progress: ProgressCallback) -> list[Check]:
    """Compare the engine with ONNX Runtime on the CPU: prefill and decode on the same inputs.

    Args:
        folder: of the engines; its files match the manifest.
        manifest: of the engines.
        guarded: the folder that they were built from, verified.
        report_progress: called with `(stage, done, total)`.

    Raises:
        GuardError: there is no GPU, or the engine does not run on it.
    """
    records = [engine for engine in manifest.engines if engine.is_decoder]
    package = open_guarded_package(guarded, read_manifest(guarded))
    anatomy = dissect(package.load_decoder(), package.declared_layers)
    inputs = _inputs(package, anatomy, min(map(_rows, records)), report_progress)
    found = rolled(GuardedVLM.open_unproved(folder).decoder, inputs)
    expected = rolled(open_decoder(package, runtime="onnxruntime-cpu"), inputs)
    stripped = package.load_decoder()
    strip_guard(stripped)
    unguarded = rolled(open_decoder(package, stripped, runtime="onnxruntime-cpu"), inputs)
    return [same_outputs(expected, found, unguarded, TOLERANCE[anatomy.sites[0].dtype], inputs.origin)]


def _rows(record: EngineRecord) -> int:
    """Number of prompts that fit in one call of every profile."""
    batches = [shapes[2][0] for profile in record.profiles for shapes in profile["shapes"].values() if shapes[2]]
    return max(1, min(batches, default=1))


def _inputs(
    package: ModelPackage, anatomy: DecoderAnatomy, rows: int, report_progress: ProgressCallback
) -> ProofInputs:
    source = Source(package, package.name, package.root.parent, package.root)
    return make_proof_inputs(Session(source, anatomy, report_progress), package, rows=rows)


Rolled = list[dict[str, np.ndarray]]


def rolled(session: DecoderSession, inputs: ProofInputs) -> Rolled:
    """Every output of a prefill and of each decode step, batch by batch; in mode `supervise` after a text-only pass.

    Coordinates are compared in prefills alone: in decode steps nothing reads them, and a decode engine does not output them.
    """
    found: Rolled = []
    for batch, text in zip(inputs.batches, inputs.texts, strict=True):
        supervisor = None
        if session.supervised:
            outputs, _ = session.prefill(text, session.no_supervisor(text.size))
            supervisor = session.coordinates(outputs)
        outputs = roll(session, batch, supervisor, steps=STEPS)
        found += [
            {name: np.asarray(call[name]) for name in call if not (number and name == COORDINATES_OUTPUT)}
            for number, call in enumerate(outputs)
        ]
    return found


def same_outputs(expected: Rolled, found: Rolled, unguarded: Rolled, limit: float, origin: str) -> Check:
    """Largest deviation of any output of any call, relative to the largest number of that output.

    It must also be smaller than the guard's effect on the same inputs: an engine without the guard must fail.

    Args:
        expected: outputs of ONNX Runtime.
        found: outputs of the engine.
        unguarded: outputs of the graph without the guard.
        limit: largest allowed deviation.
        origin: of the inputs, for the check's note.
    """
    seen, moved = Comparison("ONNX Runtime", "the engine"), 0.0
    for number, (before, after, without) in enumerate(zip(expected, found, unguarded, strict=True)):
        first = next(iter(before.values()), np.zeros((0,)))
        seen.see(f"call {number}", np.ones((len(first), 1), np.int64), before, after)
        moved = max([moved, *(relative(value, without[name]) for name, value in before.items() if name in without)])
    note = f"{len(found)} calls, every output, {origin}; the guard moves them by up to {moved:.1e}"
    ok = seen.compared > 0 and seen.worst <= limit and seen.worst < moved
    name = "the engine gives what ONNX Runtime gives on the CPU"
    return Check(name, seen.compared, seen.worst, limit, ok, seen.note or note)
