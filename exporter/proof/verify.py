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
from typing import Any

import onnx_ir as ir

from ...graphs.anatomy import DecoderAnatomy, dissect
from ...graphs.digests import sha256_file, sha256_files
from ...graphs.directions import DIRECTIONS_FILE, read_directions
from ...graphs.errors import GuardError, ManifestMismatch
from ...graphs.fold import FOLD
from ...graphs.fold_proof import prove_fold, refolded, writers_orthogonal
from ...graphs.manifest import MANIFEST_NAME, DecoderRecord, Manifest, read_manifest, require_intact
from ...graphs.package import COMPANIONS, GUARD_DATA, SBOM_NAME, ModelPackage, external_files, open_package, relocated
from ...graphs.plan import GuardPlan, plan_guard
from ...graphs.rewrite import rewrite
from ...graphs.spec import GuardSpec
from ...graphs.staging import write_file
from ...graphs.static_proof import (
    Check,
    exact,
    guard_dominates,
    initializers_untouched,
    same_graph,
    signature_unchanged,
    sites_guarded_once,
)
from ...graphs.strip import strip_guard
from ...runtime.guarded import open_guarded_package
from ..artifact.signing import check_signature
from ..calibration.calibrate import DEFAULT_BUDGET
from ..calibration.guard_config import CONFIG_NAME
from ..calibration.no_worse import Refusals
from ..engines.verify import check_by_running, check_records, check_sources
from ..guide import Guide
from ..packaging.triton_files import check_repository
from ..sources import Source, Watch, unwatched
from .config_check import require_config_of_graph
from .inputs import ProofInputs, given_inputs
from .level import ENGINES_RUN, ProofLevel, choose_level, is_more
from .prove import prove_by_running
from .prove_fold import prove_fold_by_running
from .prove_local import prove_locally

# the unguarded model and its anatomy -> what to run it on
MakeInputs = Callable[[ModelPackage, DecoderAnatomy], ProofInputs]


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        manifest: of the folder.
        checks: each with what it compared.
    """

    manifest: Manifest
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "mode": self.manifest.plan.get("mode"),
            "layers": self.manifest.plan.get("layers"),
            "checks": [check.to_json() for check in self.checks],
        }


def verify(
    folder: Path | str,
    source: Path | str | None = None,
    run: bool = False,
    proof_inputs: Sequence[Path | str] = (),
    watch: Watch | None = None,
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
        watch: told what is going on.
        public_key: PEM of who must have signed the folder (`signing`).

    Raises:
        GuardError: `run` without a source.
        ManifestMismatch: no manifest, a changed file, a source that is not the one that the manifest names, or a `guard.toml`
            with a value that the graph does not have.
    """
    if run and source is None:
        raise GuardError("running the proof compares with what the folder was made from; give that with --source")
    if proof_inputs:
        given_inputs(tuple(map(Path, proof_inputs)))  # unfit files are refused before minutes of work
    folder = Path(folder).absolute()
    tell = watch or unwatched
    signed = [check_signature(folder, public_key)] if public_key is not None else []
    manifest = read_manifest(folder)
    files = require_intact(folder, manifest, progress=lambda done, total: tell("hashing (bytes)", done, total))
    unhashed = [name for name, record in manifest.files.items() if record.sha256 is None]
    note = f"by size alone, as asked at export: {', '.join(unhashed)}" if unhashed else ""
    checks = [*signed, exact("every file has the manifest's SHA-256", files - len(unhashed), [], note)]
    checks += _no_fewer_refused(manifest)
    if manifest.engines:
        if proof_inputs:
            raise GuardError(f"{folder}: holds engines, which are run on prompts; leave --proof-inputs out")
        level = ENGINES_RUN if run else None
        return _finished(folder, manifest, checks + _verify_engines(folder, manifest, source, run, tell), level)
    views = {view.decoder: view for view in open_guarded_package(folder, manifest).views()}
    originals = originals_of(source, manifest) if source is not None else {}
    level = _level(manifest, originals) if run else None
    is_run, locally = (level is not None and level.level == name for name in ("full", "local"))
    inputs = partial(_inputs, given=tuple(map(Path, proof_inputs)), tell=tell) if is_run else None
    for record in manifest.decoders:
        path = folder / record.path
        if path not in views:
            raise ManifestMismatch(f"{path}: is in the manifest, but is no decoder of this folder; export again")
        tell(f"verifying {path.name}", 0, 1)
        made = _verify_decoder(views[path], manifest, record, originals.get(record.path), inputs, locally)
        tell(f"verifying {path.name}", 1, 1)
        several = len(manifest.decoders) > 1
        checks += [replace(check, name=f"{path.name}: {check.name}") if several else check for check in made]
    if manifest.layout == "triton" and manifest.packaged is not None:
        checks += check_repository(folder, manifest, views[folder / manifest.decoder])
    if originals:
        checks += _same_files_around(folder, manifest, originals[manifest.decoder])
    if all(check.ok for check in checks):  # the plan is the graph's: what differs now is the config
        _require_config(views[folder / manifest.decoder], manifest)
    return _finished(folder, manifest, checks, level)


def _level(manifest: Manifest, originals: Mapping[str, ModelPackage]) -> ProofLevel:
    """As at export: the model is run if it fits into the memory that is free."""
    models = [(original, original.load_decoder()) for original in originals.values()]
    return choose_level("auto", models, manifest.plan.get("lowering", ""))


def _finished(folder: Path, manifest: Manifest, checks: Sequence[Check], level: ProofLevel | None) -> Verification:
    """What was found; the manifest learns of a run that proved more than it says.

    Args:
        level: of this run; `None` where nothing was run.
    """
    found = Verification(manifest, tuple(checks))
    if level is not None and found.ok and is_more(level.level, manifest.proved):
        manifest = manifest.model_copy(update={"proved": level.level, "proved_because": f"by verify: {level.why}"})
        write_file(folder / MANIFEST_NAME, manifest.to_text().encode())
    return replace(found, manifest=manifest)


def _no_fewer_refused(manifest: Manifest) -> list[Check]:
    """What was counted at export; none where no prompts were at hand."""
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


def _verify_engines(folder: Path, manifest: Manifest, source: Path | str | None, run: bool, tell: Watch) -> list[Check]:
    checks = check_records(manifest)
    if source is None:
        return checks
    guarded = Path(source).absolute()
    checks += [replace(check, name=f"guarded graph: {check.name}") for check in verify(guarded, watch=tell).checks]
    checks += check_sources(manifest, guarded)
    if run and all(check.ok for check in checks):
        checks += check_by_running(folder, manifest, guarded, tell)
    return checks


def _verify_decoder(
    package: ModelPackage,
    manifest: Manifest,
    record: DecoderRecord,
    original: ModelPackage | None,
    inputs: MakeInputs | None,
    locally: bool,
) -> list[Check]:
    """One decoder; with `locally` each of its guards is run by itself."""
    shipped, stripped = package.load_decoder(), package.load_decoder()
    strip_guard(stripped)
    anatomy = dissect(stripped, package.declared_layers)
    plan = plan_again(package.root, manifest, record, stripped, anatomy)
    if plan.lowering == FOLD:
        return _verify_fold(package, manifest, shipped, anatomy, plan, original, inputs)
    again = package.load_decoder()
    strip_guard(again)
    dissect(again, package.declared_layers)
    report = rewrite(again, plan)
    checks = [
        same_graph("the guard is what the manifest's plan and directions make", again, shipped),
        sites_guarded_once(shipped, plan, report),
        guard_dominates(shipped, anatomy, plan, report),
    ]
    if original is not None:
        graph = original.load_decoder()
        dissect(graph)
        for model in (stripped, shipped):
            _name_data_as_before(model, package, manifest)
        checks += [
            same_graph("without its guard it is the source, node for node", stripped, graph),
            signature_unchanged(graph, shipped, plan),
            initializers_untouched(graph, shipped),
            *_same_external_data(original.decoder, package, manifest),
        ]
        if inputs is not None:
            checks += prove_by_running(original, package.decoder, plan, report, inputs(original, anatomy))
        if locally:
            checks += prove_locally(package.decoder, plan, report)
    return checks


def _require_config(package: ModelPackage, manifest: Manifest) -> None:
    """Where the folder has a `guard.toml`, it gives the guard that is in the graph.

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


def _verify_fold(
    package: ModelPackage,
    manifest: Manifest,
    shipped: ir.Model,
    anatomy: DecoderAnatomy,
    plan: GuardPlan,
    original: ModelPackage | None,
    inputs: MakeInputs | None,
) -> list[Check]:
    """A folded decoder. The original weights are not in the folder: without the source, the algebra is what is checked."""
    checks = [writers_orthogonal(shipped, anatomy, plan)]
    if original is None:
        return checks
    graph, again = original.load_decoder(), original.load_decoder()
    for model in (graph, again):
        dissect(model, original.declared_layers)
    report = rewrite(again, plan)
    _name_data_as_before(shipped, package, manifest)
    checks += [refolded(again, shipped), *prove_fold(graph, shipped, anatomy, plan, report)[0::2]]
    checks += _same_external_data(original.decoder, package, manifest)
    if inputs is not None:
        checks += prove_fold_by_running(original, package.decoder, plan, report, inputs(original, anatomy))
    return checks


def _inputs(original: ModelPackage, anatomy: DecoderAnatomy, given: tuple[Path, ...], tell: Watch) -> ProofInputs:
    """What to run the unguarded and the guarded decoder on."""
    source = Source(original, original.name, original.root.parent, original.root)
    return Guide(source, anatomy, GuardSpec(), DEFAULT_BUDGET, False, tell, given).proof_inputs(original)


def originals_of(source: Path | str, manifest: Manifest) -> dict[str, ModelPackage]:
    """The unguarded decoder of every record; by its place in the folder, or by digest where a file was given."""
    package = open_package(source)
    views = {view.decoder.relative_to(view.root).as_posix(): view for view in package.views()}
    found = {record.path: views.get(_before(manifest, record.path), package) for record in manifest.decoders}
    for record in manifest.decoders:
        original = found[record.path]
        if sha256_file(original.decoder) != record.source.get("sha256"):
            raise ManifestMismatch(
                f"{original.decoder}: is not the model that {record.path} was made from (SHA-256 differs); give that one"
            )
    return found


def _same_external_data(source: Path, package: ModelPackage, manifest: Manifest) -> list[Check]:
    """Weights outside the graph are compared as files: inside it there are only references to them."""
    before = {path.name: digest for path, digest in sha256_files(external_files(source)).items()}
    here = {
        path: _before(manifest, path.relative_to(package.root).as_posix()) for path in external_files(package.decoder)
    }
    found = sha256_files(path for path, there in here.items() if not there.endswith(GUARD_DATA))
    after = {Path(here[path]).name: digest for path, digest in found.items()}
    wrong = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return [exact("external weights are the source's files", len(before), sorted(wrong))] if before or after else []


def _name_data_as_before(model: ir.Model, package: ModelPackage, manifest: Manifest) -> None:
    """Let references to external data be those of the folder that this one was packaged from, to be compared as references."""
    if manifest.packaged is None:
        return
    folder = package.decoder.parent.relative_to(package.root)
    graph = Path(_before(manifest, package.decoder.relative_to(package.root).as_posix()))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            there = Path(_before(manifest, (folder / str(tensor.location)).as_posix()))
            location = there.relative_to(graph.parent).as_posix()
            value.const_value = relocated(tensor, location)


def _same_files_around(folder: Path, manifest: Manifest, original: ModelPackage) -> list[Check]:
    """Encoders, embeddings, tokenizer, template, configs: what a prompt or a picture becomes before it meets the guard."""
    decoders = [folder / record.path for record in manifest.decoders]
    ours = {DIRECTIONS_FILE, SBOM_NAME, *(record.path for record in manifest.decoders)}
    ours |= {data.relative_to(folder).as_posix() for decoder in decoders for data in external_files(decoder)}
    ours |= set(manifest.packaged.written) if manifest.packaged is not None else set()
    before = {relative: path for path, relative in original.files()}
    here = {_before(manifest, name): name for name in manifest.files if name not in ours}
    shared = sorted(here.keys() & before.keys())
    digests = sha256_files([before[name] for name in shared] + [folder / here[name] for name in shared])
    wrong = [here[name] for name in shared if digests[before[name]] != digests[folder / here[name]]]
    wrong += [f"{here[name]} is not in the source" for name in sorted(here.keys() - before.keys())]
    left = set(manifest.packaged.left_out) if manifest.packaged is not None else set()
    gone = before.keys() - here.keys() - left - set(manifest.files)
    wrong += [f"{name} is missing" for name in sorted(gone) if _is_needed(name)]
    return [exact("files around the decoder are the source's", len(shared), wrong)] if shared or wrong else []


def _before(manifest: Manifest, path: str) -> str:
    """Where a file was when the folder had the source's layout."""
    return manifest.packaged.before(path) if manifest.packaged is not None else path


def _is_needed(name: str) -> bool:
    """A source may have got notes and prompts since; graphs and what goes with a tokenizer were there."""
    return name.endswith(".onnx") or Path(name).name in COMPANIONS


# Of a plan: what was measured or remarked at export. It decides nothing, and cannot be made again from the folder's files.
_FOR_READERS = ("notes", "separation")


def plan_again(
    folder: Path, manifest: Manifest, record: DecoderRecord, stripped: ir.Model, anatomy: DecoderAnatomy
) -> GuardPlan:
    """The plan, from the folder's own directions and the manifest's decisions; it must say what the manifest says."""
    recorded = record.plan
    wished = dict(manifest.spec)
    try:
        if wished.get("layers") is not None:
            wished["layers"] = tuple(wished["layers"])
        spec = GuardSpec(**wished)
    except TypeError as error:
        raise ManifestMismatch(f"{folder}: the manifest's spec cannot be read ({error}); export again") from None
    plan = plan_guard(stripped, anatomy, read_directions(folder / DIRECTIONS_FILE), spec)
    made = plan.to_json()
    differing = [key for key in made if key not in _FOR_READERS and made[key] != recorded.get(key)]
    if differing:
        raise ManifestMismatch(
            f"{folder}: the manifest's plan is not what its spec and directions give ({', '.join(differing)} differ); "
            "export again"
        )
    return plan
