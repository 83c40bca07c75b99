"""`verify`: redo the proof of a guarded folder from its files alone, and against the source model where it is at hand.

From the files: digests; the guard is taken out of the shipped graph again (`strip_guard`), planned afresh from the
folder's own directions and spec, put back in, and must be the shipped graph node for node and number for number; the
guard dominates. With the source: the stripped graph must be the source's, with its inputs, outputs and weights; and on
request both are run, which completes a folder that was exported with the proof of its structure alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy, dissect, prepare
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.lowerings.fold import FOLD
from ...graphs.manifest import DecoderRecord, Manifest, read_manifest, require_intact, write_manifest
from ...graphs.package import ModelPackage
from ...graphs.plan import GuardPlan
from ...graphs.progress import ProgressCallback, ignore_progress
from ...graphs.proof.fold_proof import prove_fold, refolded, writers_orthogonal
from ...graphs.proof.strip import names_left, strip_guard
from ...graphs.proof.structure import (
    Check,
    exact,
    guard_dominates,
    initializers_untouched,
    same_graph,
    signature_unchanged,
    sites_guarded_once,
)
from ...graphs.rewrite import rewrite
from ...runtime.guarded import open_guarded_package
from ..artifact.signing import check_signature
from ..calibration.guard_config import CONFIG_NAME
from ..calibration.refusal_regression import Refusals
from ..engines.verify_engines import check_around_engines, check_by_running, check_records, check_sources
from ..packaging.regenerate import check_packaged, load_restored
from ..packaging.triton_files import check_repository, own_code
from ..session import Session
from ..sources import Source
from .accounting import check_engine_files, check_graphs, check_layout, require_kind, text_inputs
from .beside_source import Contents, check_around, check_external_data
from .config_check import require_config_of_graph
from .inputs import ProofInputs
from .level import ENGINES_RUN, ProofLevel, choose_level, is_more
from .make_inputs import make_proof_inputs
from .npz import read_npz
from .prove import prove_by_running
from .prove_fold import prove_fold_by_running
from .prove_local import prove_locally
from .recorded_plan import originals_of, plan_again

_RUN_THE_ENGINES = (
    "engines cannot be read back; run `vlmguard verify --run --source GUARDED` on the GPU that runs them, with the guarded "
    "folder that they were built from"
)
# the unguarded model and its anatomy -> what to run it on
MakeInputs = Callable[[ModelPackage, DecoderAnatomy], ProofInputs]


State = Literal["verified", "failed", "not verified"]


@dataclass(frozen=True)
class Verification:
    """Result of `verify`.

    Attributes:
        manifest: of the folder.
        checks: each with what it compared.
        missing: what could not be verified, and what to do about it; "" where nothing is missing. An engine cannot be read
            back, so that only running it verifies it.
    """

    manifest: Manifest
    checks: tuple[Check, ...]
    missing: str = ""

    def __repr__(self) -> str:
        held = sum(check.ok for check in self.checks)
        return f"Verification({self.state}, {held} of {len(self.checks)} checks hold)"

    @property
    def state(self) -> State:
        if not self.checks or not all(check.ok for check in self.checks):
            return "failed"
        return "not verified" if self.missing else "verified"

    @property
    def ok(self) -> bool:
        return self.state == "verified"

    def to_json(self) -> dict[str, Any]:
        """The content of `--json`."""
        return {
            "ok": self.ok,
            "state": self.state,
            "missing": self.missing,
            "mode": self.manifest.plan.get("mode"),
            "layers": self.manifest.plan.get("layers"),
            "checks": [check.to_json() for check in self.checks],
        }


def verify(
    folder: Path | str,
    source: Path | str | None = None,
    run: bool = False,
    proof_inputs: Sequence[Path | str] = (),
    report_progress: ProgressCallback = ignore_progress,
    *,
    public_key: Path | str | None = None,
) -> Verification:
    """Redo the proof.

    Args:
        folder: a guarded folder, of graphs or of engines.
        source: the unguarded model (file or folder), if at hand; for engines the guarded folder that they were built from.
        run: run the guarded graphs against the source's too. A model that does not fit into the free memory is
            not run; each of its guards is, by itself. Where all holds, the manifest records what was proved.
        proof_inputs: what to run them on, as for `export`.
        report_progress: called with `(stage, done, total)`.
        public_key: PEM of who must have signed the folder (`signing`).

    Raises:
        GuardError: `run` without a source.
        ManifestMismatch: no manifest, a changed file, a source that is not the one that the manifest names, or a `guard.toml`
            with a value that the graph does not have.
    """
    if run and source is None:
        raise GuardError("running the proof compares with what the folder was made from; give that with --source")
    for path in proof_inputs:
        read_npz(Path(path))  # damaged files are refused before minutes of work
    folder = Path(folder).absolute()
    signed = [check_signature(folder, public_key)] if public_key is not None else []
    manifest = read_manifest(folder)
    files = require_intact(
        folder, manifest, report_count=lambda done, total: report_progress("hashing (bytes)", done, total)
    )
    unhashed = [name for name, record in manifest.files.items() if record.sha256 is None]
    note = f"by size alone, as requested at export: {', '.join(unhashed)}" if unhashed else ""
    checks = [*signed, exact("every file has the manifest's SHA-256", files - len(unhashed), [], note)]
    checks += _no_fewer_refused(manifest)
    require_kind(folder, manifest)
    if manifest.engines:
        if proof_inputs:
            raise GuardError(f"{folder}: holds engines, which are run on prompts; leave --proof-inputs out")
        checks += _verify_engines(folder, manifest, source, run, report_progress)
        missing = "" if source is not None and run else _RUN_THE_ENGINES
        return replace(_finished(folder, manifest, checks, ENGINES_RUN if run else None), missing=missing)
    guarded = open_guarded_package(folder, manifest)
    checks.append(check_layout(manifest, guarded))
    views = {view.decoder: view for view in guarded.views()}
    originals = originals_of(source, manifest) if source is not None else {}
    level = _level(manifest, originals) if run else None
    is_run, locally = (level is not None and level.level == name for name in ("full", "local"))
    contents = Contents(folder, manifest)
    inputs = partial(_inputs, given=tuple(map(Path, proof_inputs)), report_progress=report_progress) if is_run else None
    for record in manifest.decoders:
        path = folder / record.path
        if path not in views:
            raise ManifestMismatch(f"{path}: is in the manifest, but is no decoder of this folder; export again")
        report_progress(f"verifying {path.name}", 0, 1)
        checked = _verify_decoder(views[path], manifest, record, originals.get(record.path), inputs, locally, contents)
        report_progress(f"verifying {path.name}", 1, 1)
        several = len(manifest.decoders) > 1
        checks += [replace(check, name=f"{path.name}: {check.name}") if several else check for check in checked]
    checks += _verify_folder(folder, manifest, guarded, originals, contents)
    if all(check.ok for check in checks):  # the plan is the graph's: what differs now is the config
        _require_config(views[folder / manifest.decoder], manifest)
    return _finished(folder, manifest, checks, level)


def _level(manifest: Manifest, originals: Mapping[str, ModelPackage]) -> ProofLevel:
    """As at export: the model is run if it fits into the memory that is free."""
    models = [(original, original.load_decoder()) for original in originals.values()]
    return choose_level("auto", models, manifest.plan.get("lowering", ""))


def _verify_folder(
    folder: Path,
    manifest: Manifest,
    guarded: ModelPackage,
    originals: Mapping[str, ModelPackage],
    contents: Contents,
) -> list[Check]:
    """Check the files around the decoders; the folder determines which checks there are."""
    original = originals.get(manifest.decoder)
    stripped = guarded.load_decoder()
    strip_guard(stripped)
    code = frozenset(own_code()) if guarded.layout == "triton" else frozenset()
    checks = check_graphs(folder, manifest, stripped, dissect(stripped, guarded.declared_layers), code, guarded.head)
    if manifest.packaged is not None:
        checks.append(check_packaged(folder, manifest, guarded, original))
        if guarded.layout == "triton":
            checks += check_repository(folder, manifest, guarded)
    if original is not None and all(check.ok for check in checks):
        checks += check_around(folder, manifest, guarded, original, contents)
    return checks


def _finished(folder: Path, manifest: Manifest, checks: Sequence[Check], level: ProofLevel | None) -> Verification:
    """The result; a run with a stronger proof than recorded is added to the manifest.

    Args:
        level: of this run; `None` if nothing ran.
    """
    found = Verification(manifest, tuple(checks))
    if level is not None and found.ok and is_more(level.level, manifest.proved):
        manifest = manifest.model_copy(update={"proved": level.level, "proved_because": f"by verify: {level.why}"})
        write_manifest(folder, manifest, replace=True)
    return replace(found, manifest=manifest)


def _no_fewer_refused(manifest: Manifest) -> list[Check]:
    """The check of the export's counted refusals; none if the export had no prompts."""
    if manifest.refusals is None:
        return []
    try:
        found = Refusals.from_json(manifest.refusals)
    except (TypeError, KeyError, ValueError) as error:
        raise ManifestMismatch(f"the manifest's refusals cannot be read ({error}); export again") from None
    weaker = [f"{s.setting}: {s.guarded} of {s.asked}, unguarded {s.unguarded}" for s in found.settings if s.lost]
    asked = sum(setting.asked for setting in found.settings)
    name = "no fewer harmful prompts refused than without the guard, as counted at export"
    checks = [exact(name, asked, weaker, f"{found.prompts}: {found}")]
    if found.counted:
        nothing = [f"no effect on {found.counted} harmful prompts"] if found.no_effect else []
        allowed = f"{nothing[0]}, allowed with --allow-no-effect" if nothing and found.allowed_no_effect else ""
        name = "an effect on harmful prompts was counted at export, or none was allowed"
        checks.append(exact(name, found.counted, [] if allowed else nothing, allowed))
    return checks


def _verify_engines(
    folder: Path, manifest: Manifest, source: Path | str | None, run: bool, report_progress: ProgressCallback
) -> list[Check]:
    checks = [*check_engine_files(folder, manifest), *check_records(manifest)]
    if source is None or not all(check.ok for check in checks):
        return checks
    guarded = Path(source).absolute()
    checks += [
        replace(check, name=f"guarded graph: {check.name}")
        for check in verify(guarded, report_progress=report_progress).checks
    ]
    checks += [*check_sources(manifest, guarded), check_around_engines(manifest, guarded)]
    if run and all(check.ok for check in checks):
        checks += check_by_running(folder, manifest, guarded, report_progress)
    return checks


def _verify_decoder(
    package: ModelPackage,
    manifest: Manifest,
    record: DecoderRecord,
    original: ModelPackage | None,
    inputs: MakeInputs | None,
    locally: bool,
    contents: Contents,
) -> list[Check]:
    """One decoder; with `locally` each of its guards is run by itself."""
    shipped, stripped = load_restored(manifest, package), package.load_decoder()
    strip_guard(stripped)
    left = [f"{name!r} is left" for name in names_left(stripped)]
    anatomy = dissect(stripped, package.declared_layers)
    plan = plan_again(package.root, manifest, record, stripped, anatomy)
    if plan.lowering == FOLD:
        return [_names(stripped, left), *_verify_fold(package, shipped, anatomy, plan, original, inputs, contents)]
    again = package.load_decoder()
    strip_guard(again)
    dissect(again, package.declared_layers)
    report = rewrite(again, plan)
    checks = [
        same_graph("the guard is what the manifest's plan and directions make", again, shipped),
        sites_guarded_once(shipped, plan, report),
        _names(stripped, left),
        guard_dominates(shipped, anatomy, plan, report, text_inputs(package)),
    ]
    if original is not None:
        graph = original.load_decoder()
        prepare(graph)
        contents.refer(graph, original.decoder)
        for model in (stripped, shipped):
            contents.refer(model, package.decoder)
        checks += [
            same_graph("without its guard it is the source, node for node", stripped, graph),
            signature_unchanged(graph, shipped, plan),
            initializers_untouched(graph, shipped),
            *check_external_data(contents, original.decoder, package.decoder),
        ]
        if inputs is not None:
            checks += prove_by_running(original, package.decoder, plan, report, inputs(original, anatomy))
        if locally:
            checks += prove_locally(package.decoder, plan, report)
    return checks


def _require_config(package: ModelPackage, manifest: Manifest) -> None:
    """Check that a folder's `guard.toml` describes the guard in the graph.

    Raises:
        ManifestMismatch: a value differs.
    """
    if not (package.root / CONFIG_NAME).is_file():
        return
    stripped = package.load_decoder()
    strip_guard(stripped)
    anatomy = dissect(stripped, package.declared_layers)
    plan = plan_again(package.root, manifest, manifest.decoders[0], stripped, anatomy)
    require_config_of_graph(package.root / CONFIG_NAME, plan, stripped, anatomy)


def _names(stripped: ir.Model, left: list[str]) -> Check:
    """Nothing but the planned guard bears its names."""
    nodes = sum(1 for _ in stripped.graph.all_nodes())
    return exact("only the planned guard bears the guard's names", nodes, left)


def _verify_fold(
    package: ModelPackage,
    shipped: ir.Model,
    anatomy: DecoderAnatomy,
    plan: GuardPlan,
    original: ModelPackage | None,
    inputs: MakeInputs | None,
    contents: Contents,
) -> list[Check]:
    """A folded decoder. The original weights are not in the folder: without the source, the algebra is what is checked."""
    checks = [writers_orthogonal(shipped, anatomy, plan)]
    if original is None:
        return checks
    graph, again = original.load_decoder(), original.load_decoder()
    for model in (graph, again):
        dissect(model, original.declared_layers)
    report = rewrite(again, plan)
    contents.refer(graph, original.decoder)
    contents.refer(again, original.decoder)
    contents.refer(shipped, package.decoder)
    checks += [refolded(again, shipped), *prove_fold(graph, shipped, anatomy, plan, report)[0::2]]
    checks += check_external_data(contents, original.decoder, package.decoder)
    if inputs is not None:
        checks += prove_fold_by_running(original, package.decoder, plan, report, inputs(original, anatomy))
    return checks


def _inputs(
    original: ModelPackage, anatomy: DecoderAnatomy, given: tuple[Path, ...], report_progress: ProgressCallback
) -> ProofInputs:
    """Inputs for the unguarded and the guarded decoder."""
    source = Source(original, original.name, original.root.parent, original.root)
    return make_proof_inputs(Session(source, anatomy, report_progress), original, given)
