"""The graphs of a decoder's engines: derived from a guarded folder's decoder, and proved like it.

`engine_plans` defines what differs. Each graph is written by the rewrite that wrote the guarded decoder, into the same
unguarded decoder; the proof shows that nothing else differs, and that each guard computes the reference's states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy, dissect
from ...graphs.engine_plans import decode_step_plan, prompt_plan
from ...graphs.errors import RunFailed
from ...graphs.graph_io import graph_bytes, in_memory
from ...graphs.lowerings.fold import FOLD
from ...graphs.manifest import EngineRecord, Manifest
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.proof.cut_out import cut_out
from ...graphs.proof.strip import strip_guard
from ...graphs.proof.structure import Check, exact, prove_structure, same_graph
from ...graphs.rewrite import GuardReport, rewrite
from ...graphs.tensorrt import settle_sizes
from ...runtime.runners import open_runner
from ..proof.local_calls import call_feeds, call_part, guard_streams, refused_calls
from ..proof.prove_local import prove_graph_locally
from ..proof.recorded_plan import plan_again

DERIVED = "derived_sha256"  # key of an engine's source: the digest of the graph that was derived and built

DecoderRole = Literal["decoder", "decode_step"]
_PLANS: Mapping[DecoderRole, Callable[[GuardPlan], GuardPlan | None]] = {
    "decoder": prompt_plan,
    "decode_step": decode_step_plan,
}
# What a check calls each role's graph and engine.
_NAMES: Mapping[str, str] = {"decoder": "prompt", "decode_step": "decode"}


@dataclass(frozen=True)
class EngineGraph:
    """A decoder graph that an engine is built from in place of the guarded folder's.

    Attributes:
        role: of the engine.
        model: the graph as TensorRT gets it.
        unguarded: the guarded folder's decoder without its guard.
        anatomy: of `unguarded`.
        plan, report: of the guard in `model`.
        sha256: hexadecimal digest of the serialized graph; big weights are in it as references to their files.
        proof: of the graph; empty before it.
    """

    role: DecoderRole
    model: ir.Model
    unguarded: ir.Model
    anatomy: DecoderAnatomy
    plan: GuardPlan
    report: GuardReport
    sha256: str
    proof: tuple[Check, ...] = ()


def derive_engine_graph(
    folder: Path, manifest: Manifest, package: ModelPackage, role: DecoderRole
) -> EngineGraph | None:
    """The graph of one of a decoder's engines; `None` where the guarded decoder itself serves as well.

    Args:
        folder: the guarded folder.
        manifest: of the folder.
        package: the model in it.
        role: `decoder` for prompts and, in a single engine, decode steps; `decode_step` for calls of one token per row.

    Raises:
        ManifestMismatch: the folder's spec and directions do not give the recorded plan.
    """
    if manifest.plan.get("lowering") == FOLD:
        return None
    unguarded = _stripped(package)
    anatomy = dissect(unguarded, package.declared_layers)
    plan = _PLANS[role](plan_again(folder, manifest, manifest.decoders[0], unguarded, anatomy))
    if plan is None:
        return None
    model = _stripped(package)
    dissect(
        model, package.declared_layers
    )  # infers what it needs in place, as it did before the guarded decoder was written
    report = rewrite(model, plan)
    for graph in (model, unguarded):
        settle_sizes(graph)
    content, _ = in_memory(model, package.decoder.parent, maps=False)
    return EngineGraph(role, model, unguarded, anatomy, plan, report, hashlib.sha256(content).hexdigest())


def _stripped(package: ModelPackage) -> ir.Model:
    model = package.load_decoder()
    strip_guard(model)
    return model


def prove_engine_graph(graph: EngineGraph) -> tuple[Check, ...]:
    """The proof of a derived graph: its structure, each guard run on its own, and that other calls fail."""
    again = graph.model.clone()
    strip_guard(again)
    checks = (
        same_graph("without its guard it is the guarded decoder without its guard", graph.unguarded, again),
        *prove_structure(graph.unguarded, graph.model, graph.anatomy, graph.plan, graph.report),
        *prove_graph_locally(graph.model, graph.plan, graph.report),
        *_prove_refusals(graph),
    )
    return tuple(replace(check, name=f"{_NAMES[graph.role]} graph: {check.name}") for check in checks)


def _prove_refusals(graph: EngineGraph) -> Iterator[Check]:
    """A mask that is longer than the tokens so far is an error: the guard would take another token for the last one."""
    plan = graph.plan
    calls = refused_calls(plan)
    if not calls:
        return
    wrong, compared = [], 0
    layers = plan.layers if plan.added_outputs else plan.layers[:1]
    for body in plan.bodies:
        cut = cut_out(graph.model, plan, graph.report, body, layers, outputs=bool(plan.added_outputs))
        if cut.model is None:
            wrong.append("the guard is not there")
            continue
        runner = open_runner(graph_bytes(cut.model), Path.cwd())
        states = guard_streams(cut, plan)
        for call in calls:
            compared += 1
            columns, tokens = call.mask.mask.shape[1], call.mask.past + call.mask.tokens
            try:
                runner.run(call_feeds(cut, plan, call, call_part(states, call.mask)))
                wrong.append(f"a mask of {columns} columns for {tokens} tokens is accepted")
            except RunFailed:
                continue
    yield exact("a mask with more columns than tokens is an error", compared, wrong)


def check_engine_graphs(manifest: Manifest, guarded: Path, source: Manifest, package: ModelPackage) -> list[Check]:
    """Derive the graphs of the decoder's engines again: those that were built, and proved again.

    Args:
        manifest: of the folder of engines.
        guarded: the folder that they were built from.
        source: manifest of that folder.
        package: the model in it.
    """
    checks: list[Check] = []
    for role in _PLANS:
        records = [engine for engine in manifest.engines if engine.role == role]
        if records:
            checks += _check_role(records, derive_engine_graph(guarded, source, package, role), role)
    return checks


def _check_role(records: list[EngineRecord], graph: EngineGraph | None, role: DecoderRole) -> list[Check]:
    expected = None if graph is None else graph.sha256
    wrong = [record.path for record in records if record.source.get(DERIVED) != expected]
    if graph is None and role == "decode_step":
        wrong = [record.path for record in records]
    name = f"the {_NAMES[role]} engine was built from the graph that the guarded folder gives"
    checks = [exact(name, len(records), wrong)]
    return checks if graph is None else [*checks, *prove_engine_graph(graph)]
