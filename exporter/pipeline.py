"""`export`: the whole story on one screen, from a model to a guarded, proved folder.

    source ──► package ──► anatomy ──► directions (given, or extracted and calibrated) ──► plan
           ──► rewrite ──► proof ──► folder (decoder, untouched files, directions.safetensors, guard.json)

Everything is written into a hidden sibling of OUT first; OUT appears, complete, only after the proof has passed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..graphs.anatomy import DecoderAnatomy, dissect
from ..graphs.directions import Directions, directions_bytes, read_directions
from ..graphs.errors import DirectionMismatch, ModelUnreadable, OutputRefused, PromptsUnusable, ProofFailed
from ..graphs.manifest import MANIFEST_NAME, SCHEMA, Manifest
from ..graphs.package import ModelPackage, external_files, load_graph, open_package, save_graph, sha256_file
from ..graphs.plan import GuardPlan, plan_guard
from ..graphs.rewrite import GuardReport, rewrite
from ..graphs.spec import GuardSpec, Mode
from ..graphs.staging import link_or_copy, require_writable, staged, write_file
from ..graphs.static_proof import Check, prove_structure
from ..runtime.decoder import DecoderSession, open_decoder
from ..runtime.guarded import GuardedVLM
from ..runtime.onnxruntime_runner import import_onnxruntime
from ..runtime.vlm import Request, VisionLanguageModel
from .calibrate import DEFAULT_BUDGET, Calibration, Watch, calibrate
from .checkpoint import Dtype, convert_checkpoint
from .evaluate import Evaluation, evaluate
from .extract import extract_all_layers
from .prompts import (
    AnchorPair,
    LabelledPrompt,
    find_file,
    fingerprint,
    prompts_from_anchors,
    read_anchors,
    read_prompts,
)
from .prove import ProofInputs, proof_inputs, prove_by_running, random_inputs

ANCHOR_FILES = ("anchors.jsonl", "anchors.json", "anchors.csv")
EVALUATION_FILES = ("evaluation.jsonl", "evaluation.json", "evaluation.csv")
CALIBRATION_FILES = ("calibration.jsonl", "calibration.json", "calibration.csv")
DIRECTIONS_FILE = "directions.safetensors"
_PROOF_PROMPTS = 4  # of each label and setting
_EXTRACTED_RANK = 4


@dataclass(frozen=True)
class ExportResult:
    """What `export` did, or with `dry_run` would do.

    Attributes:
        out: the folder; not written with `dry_run`.
        anatomy, plan: always.
        report, proof: empty with `dry_run`.
        calibration: what the calibrator measured, if it ran.
        written: whether `out` was written.
    """

    out: Path
    anatomy: DecoderAnatomy
    plan: GuardPlan
    report: GuardReport | None = None
    proof: tuple[Check, ...] = ()
    calibration: Calibration | None = None
    written: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "written": self.written,
            "plan": self.plan.to_json(),
            "report": self.report.to_json() if self.report is not None else None,
            "proof": [check.to_json() for check in self.proof],
            "calibration": self.calibration.to_json() if self.calibration is not None else None,
        }


def export(
    model: Path | str,
    out: Path | str | None = None,
    *,
    spec: GuardSpec | None = None,
    directions: Path | str | None = None,
    anchors: Path | str | None = None,
    calibration: Path | str | None = None,
    budget: float = DEFAULT_BUDGET,
    variant: str | None = None,
    dtype: Dtype = "fp32",
    opset: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    watch: Watch | None = None,
) -> ExportResult:
    """Guard a model, prove the guard, write the guarded folder.

    Args:
        model: a `.onnx` file, a model folder, a Hugging Face checkpoint folder or a hub id.
        out: the folder to write; default `<name>-guarded` beside the model.
        spec: what is wanted; `None` follows the directions, or calibrates `restore`.
        directions: a directions file; without one, it is looked for beside the model, else extracted from anchors.
        anchors: anchor pairs to extract from; found beside the model if not given.
        calibration: labelled prompts to calibrate on; found beside the anchors, or made from a third of them.
        budget: highest share of harmless calibration prompts that may be refused.
        variant: precision variant of an onnx-community folder.
        dtype, opset: of the graphs exported from a checkpoint.
        dry_run: plan only; nothing is written.
        force: replace OUT, and accept directions extracted from another file.
        watch: told what is going on: `(stage, done, total)`.

    Raises:
        GuardError: anything wrong with the request or its files; nothing was written.
    """
    import_onnxruntime()  # a proof needs a runtime: say so before minutes of work
    spec = spec or GuardSpec()
    tell = watch or (lambda stage, done, total: None)
    with opened(model, variant, dtype, opset, tell) as (package, name, beside):
        target = Path(out) if out is not None else beside / f"{name}-guarded"
        if not dry_run:
            require_writable(target, force)
        graph = package.load_decoder()
        anatomy = dissect(graph, package.expected_layers)
        guide = _Guide(package, beside, anatomy, spec, budget, force, tell)
        found, calibrated = guide.directions(directions, anchors, calibration)
        plan = plan_guard(graph, anatomy, found, spec)
        plan = replace(plan, notes=(*plan.notes, *_notes_on_files(package)))
        if dry_run:
            return ExportResult(target.absolute(), anatomy, plan, calibration=calibrated)
        with staged(target, force) as stage:
            decoder = stage / package.decoder.relative_to(package.root)
            decoder.parent.mkdir(parents=True, exist_ok=True)
            report = rewrite(graph, plan)
            _bring_weights(package, stage)
            save_graph(graph, decoder)
            proof = prove(package, decoder, anatomy, plan, report, guide.proof_inputs(), tell)
            _bring_companions(package, stage)
            (stage / DIRECTIONS_FILE).write_bytes(directions_bytes(found))
            _write_manifest(stage, package, decoder, spec, plan, report, proof, calibrated)
        tell("done", 1, 1)
        return ExportResult(target.absolute(), anatomy, plan, report, proof, calibrated, written=True)


def inspect(model: Path | str, variant: str | None = None, watch: Watch | None = None) -> DecoderAnatomy:
    """The residual stream of a model's decoder; a checkpoint is exported to a temporary folder first.

    Raises:
        GuardError: it cannot be opened, or no residual stream was found, with the reason.
    """
    with opened(model, variant, "fp32", None, watch or (lambda stage, done, total: None)) as (package, _, _):
        return dissect(package.load_decoder(), package.expected_layers)


def prove(
    package: ModelPackage,
    decoder: Path,
    anatomy: DecoderAnatomy,
    plan: GuardPlan,
    report: GuardReport,
    inputs: ProofInputs,
    tell: Watch,
) -> tuple[Check, ...]:
    """Every check, on the file as it will ship.

    Raises:
        ProofFailed: one of them does not hold.
    """
    tell("proving", 0, 2)
    source = package.load_decoder()
    dissect(source)  # inlines functions and infers types exactly as was done to the graph that was rewritten
    checks = prove_structure(source, load_graph(decoder), anatomy, plan, report)
    tell("proving", 1, 2)
    _require_all(checks)
    checks += prove_by_running(package, decoder, plan, report, inputs)
    tell("proving", 2, 2)
    _require_all(checks)
    return checks


def _require_all(checks: Sequence[Check]) -> None:
    for check in checks:
        if not check.ok:
            raise ProofFailed(
                f"the proof failed at {check.name!r}: worst {check.worst:.2e}, limit {check.limit:.2e}, "
                f"{check.compared} compared ({check.note}); nothing was written"
            )


# Sources


@contextlib.contextmanager
def opened(
    model: Path | str, variant: str | None, dtype: Dtype, opset: int | None, tell: Watch
) -> Iterator[tuple[ModelPackage, str, Path]]:
    """`(package, name, folder beside which OUT goes)`; a checkpoint is exported to a temporary folder first."""
    path = Path(model)
    if is_checkpoint(model):
        with tempfile.TemporaryDirectory(prefix="vlmguard-") as temporary:
            folder = Path(temporary) / "onnx-community"
            convert_checkpoint(model, folder, dtype=dtype, opset=opset, progress=lambda stage: tell(stage, 0, 1))
            beside = path.absolute().parent if path.is_dir() else Path.cwd()
            yield open_package(folder), path.absolute().name, beside
        return
    package = open_package(path, variant)
    if package.layout == "bare":
        yield package, package.name, package.root
    else:
        yield package, package.name, package.root.parent


def is_checkpoint(model: Path | str) -> bool:
    """A Hugging Face checkpoint folder (config and weights, no ONNX), or something that can only be a hub id."""
    path = Path(model)
    if path.is_dir():
        has_graphs = any(path.glob("*.onnx")) or (path / "onnx").is_dir() or (path / "genai_config.json").is_file()
        return not has_graphs and (path / "config.json").is_file()
    text = str(model)
    return (
        not path.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")) and path.suffix != ".onnx"
    )


# Directions


@dataclass
class _Guide:
    """Where directions and proof inputs come from; the running model is opened only if something needs it."""

    package: ModelPackage
    beside: Path
    anatomy: DecoderAnatomy
    spec: GuardSpec
    budget: float
    force: bool
    tell: Watch
    model: VisionLanguageModel | None = None

    def running(self) -> VisionLanguageModel:
        if self.model is None:
            self.model = VisionLanguageModel(self.package)
        return self.model

    def directions(
        self, given: Path | str | None, anchors: Path | str | None, calibration: Path | str | None
    ) -> tuple[Directions, Calibration | None]:
        """Given, found beside the model, or extracted and calibrated."""
        path = Path(given) if given is not None else None
        if path is None and anchors is None:
            path = next((p for p in (self.package.companion(DIRECTIONS_FILE),) if p is not None), None)
        if path is None:
            made = self.calibrated(anchors, calibration)
            return made.directions, made
        found = read_directions(path)
        digest = sha256_file(self.package.decoder)
        if found.model_sha256 not in (None, digest) and not self.force:
            raise DirectionMismatch(
                f"{path}: was extracted from another decoder file (its SHA-256 begins {found.model_sha256[:12]}, this "
                f"one's {digest[:12]}); extract them again, or use them all the same with --force"
            )
        return found, None

    def calibrated(self, anchors: Path | str | None, calibration: Path | str | None) -> Calibration:
        """Extract from anchors, calibrate on the prompts that come with them or on a third of the pairs."""
        path, pairs = self.pairs(anchors)
        model = self.running()
        prompts_path = Path(calibration) if calibration is not None else None
        if prompts_path is None:
            prompts_path = next((p for p in (path.parent / name for name in CALIBRATION_FILES) if p.is_file()), None)
        if prompts_path is not None:
            prompts = read_prompts(prompts_path)
        else:  # every third pair is kept from extraction and calibrated on
            kept, pairs = pairs[::3], [pair for number, pair in enumerate(pairs) if number % 3]
            if len(kept) < 2 or len(pairs) < 2:
                raise PromptsUnusable(f"{path}: too few anchors to extract and calibrate on; give at least 6 pairs")
            prompts = prompts_from_anchors(kept, model.sees)
        if not model.sees:
            prompts = [prompt for prompt in prompts if prompt.setting == "text"]
        raw = self.extracted(pairs)
        return calibrate(model, self.anatomy, raw, prompts, self.spec, self.budget, watch=self.tell)

    def pairs(self, anchors: Path | str | None) -> tuple[Path, list[AnchorPair]]:
        """The anchor pairs that were given, or those found beside the model."""
        path = Path(anchors) if anchors is not None else self._find(ANCHOR_FILES)
        if path is None:
            raise PromptsUnusable(
                f"{self.package.root}: no directions and no anchors were given or found; give --directions, or "
                "--anchors with pairs of harmful and harmless prompts"
            )
        return path, read_anchors(path)

    def extracted(self, pairs: Sequence[AnchorPair]) -> Directions:
        """The SSD of every layer."""
        return extract_all_layers(
            self.running(),
            self.anatomy,
            pairs,
            rank=max(_EXTRACTED_RANK, self.spec.rank or 0),
            progress=lambda done, total: self.tell("extracting directions", done, total),
        )

    def _find(self, names: Sequence[str]) -> Path | None:
        """Beside the model, or (a checkpoint, exported elsewhere) beside where OUT goes."""
        found = find_file(self.package, names)
        if found is not None:
            return found
        here = [self.beside / folder / name for folder in (".", "prompts") for name in names]
        return next((path for path in here if path.is_file()), None)

    def proof_inputs(self) -> ProofInputs:
        """Real prompts if the model can read any, else seeded random inputs."""
        if self.package.companion("tokenizer.json") is None or (
            self._needs_embeds() and self.package.embed_tokens is None
        ):
            return self._random_inputs()
        model = self.running()
        return proof_inputs(model, self._proof_requests(model))

    def _proof_requests(self, model: VisionLanguageModel) -> list[Request]:
        path = self._find(CALIBRATION_FILES) or self._find(ANCHOR_FILES)
        if path is None:
            plain = ["How to bake a loaf of bread?", "How to pick a lock?", "Hello.", "What is shown here?"]
            prompts = [LabelledPrompt(str(n), text, "harmless", "text") for n, text in enumerate(plain)]
            if model.sees:
                prompts += [replace(prompt, setting="blank") for prompt in prompts]
        elif path.name in CALIBRATION_FILES:
            prompts = _some_of_each(read_prompts(path))
        else:
            prompts = prompts_from_anchors(read_anchors(path)[:_PROOF_PROMPTS], model.sees)
        return [prompt.request(model) for prompt in prompts if model.sees or prompt.setting == "text"]

    def _needs_embeds(self) -> bool:
        return any(value.name == "inputs_embeds" for value in self.package.load_decoder().graph.inputs)

    def _random_inputs(self) -> ProofInputs:
        session = open_decoder(self.package)
        graph = self.package.load_decoder().graph
        pads = not any(node.op_type == "GroupQueryAttention" for node in graph)
        return random_inputs(session, self.anatomy.width, _vocabulary(session, self.package), pads)


def _some_of_each(prompts: Sequence[LabelledPrompt]) -> list[LabelledPrompt]:
    kinds: dict[tuple[str, str], list[LabelledPrompt]] = {}
    for prompt in prompts:
        kinds.setdefault((prompt.setting, prompt.label), []).append(prompt)
    return [prompt for members in kinds.values() for prompt in members[:_PROOF_PROMPTS]]


def _vocabulary(session: DecoderSession, package: ModelPackage) -> int:
    """How many tokens there are to choose from; the logits say, or the config."""
    size = session.runner.outputs[session.logits_output].shape[-1]
    config = package.config
    return size or config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 100


# The folder


def _bring_weights(package: ModelPackage, stage: Path) -> None:
    """The decoder's external data, referenced by the guarded graph under the same relative names."""
    for path in external_files(package.decoder):
        link_or_copy(path, stage / path.relative_to(package.root))


def _bring_companions(package: ModelPackage, stage: Path) -> None:
    for path, relative in package.files():
        if not (stage / relative).exists():
            link_or_copy(path, stage / relative)


def _notes_on_files(package: ModelPackage) -> Iterator[str]:
    graphs = [name for name in package.left_out if name.endswith(".onnx")]
    if graphs:
        yield f"left out, because they would be unguarded decoders: {', '.join(graphs)}"


def _write_manifest(
    stage: Path,
    package: ModelPackage,
    decoder: Path,
    spec: GuardSpec,
    plan: GuardPlan,
    report: GuardReport,
    proof: Sequence[Check],
    calibrated: Calibration | None,
) -> None:
    files = {p.relative_to(stage).as_posix(): sha256_file(p) for p in sorted(stage.rglob("*")) if p.is_file()}
    manifest = Manifest(
        schema_=SCHEMA,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        decoder=decoder.relative_to(stage).as_posix(),
        layout=package.layout,
        source={
            "decoder": package.decoder.name,
            "sha256": sha256_file(package.decoder),
            "external_data": {path.name: sha256_file(path) for path in external_files(package.decoder)},
        },
        versions=versions(),
        spec=_plain(asdict(spec)),
        plan=plan.to_json(),
        report=report.to_json(),
        proof=[check.to_json() for check in proof],
        calibration=calibrated.to_json() if calibrated is not None else None,
    )
    (stage / MANIFEST_NAME).write_text(manifest.to_text(), encoding="utf-8")


def versions() -> dict[str, str]:
    """Of what wrote and proved a graph."""
    found = {}
    for name in ("vlmguard", "onnx", "onnx-ir", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()}


def open_model(model: Path | str, variant: str | None = None) -> VisionLanguageModel:
    """A model folder or file, running, unguarded or guarded, without looking at any manifest.

    Raises:
        ModelUnreadable: it is a checkpoint, or cannot be opened.
    """
    if is_checkpoint(model):
        raise ModelUnreadable(f"{model}: is a checkpoint, not ONNX; convert it first with `vlmguard convert`")
    return VisionLanguageModel(open_package(model, variant))


def extract_directions(
    model: Path | str,
    output: Path | str,
    *,
    anchors: Path | str | None = None,
    rank: int = _EXTRACTED_RANK,
    calibrate_for: Mode | None = None,
    calibration: Path | str | None = None,
    variant: str | None = None,
    force: bool = False,
    watch: Watch | None = None,
) -> Directions:
    """Extract directions from a model and write the file; with `calibrate_for` choose layers and thresholds too.

    Raises:
        GuardError: anything wrong with the request or its files; nothing was written.
    """
    import_onnxruntime()
    output = Path(output).absolute()
    tell = watch or (lambda stage, done, total: None)
    spec = GuardSpec(mode=calibrate_for, rank=rank)
    if output.exists() and not force:
        raise OutputRefused(f"{output}: exists already; choose another file, or replace it with --force")
    with opened(model, variant, "fp32", None, tell) as (package, _, beside):
        anatomy = dissect(package.load_decoder(), package.expected_layers)
        guide = _Guide(package, beside, anatomy, spec, DEFAULT_BUDGET, force, tell)
        if calibrate_for is None:
            found = guide.extracted(guide.pairs(anchors)[1])
        else:
            found = guide.calibrated(anchors, calibration).directions
        write_file(output, directions_bytes(found))
        return found


def compare(
    base: Path | str,
    guarded: Path | str,
    prompts: Path | str | None = None,
    max_new_tokens: int = 100,
    batch_size: int = 32,
    watch: Watch | None = None,
) -> Evaluation:
    """An unguarded and a guarded model on the same prompts; by default those found beside the base.

    Raises:
        GuardError: a model or the prompts cannot be opened, or they were calibrated on.
    """
    tell = watch or (lambda stage, done, total: None)
    unguarded, vlm = open_model(base), GuardedVLM.open(guarded)
    path = Path(prompts) if prompts is not None else find_file(unguarded.package, EVALUATION_FILES)
    if path is None:
        raise PromptsUnusable(f"{base}: no prompts were given or found; give --prompts with labelled prompts")
    rows = read_prompts(path)
    seen = set((vlm.manifest.calibration or {}).get("prompt_fingerprints", ()))
    shared = sum(fingerprint(row) in seen for row in rows)
    if shared:
        raise PromptsUnusable(f"{path}: {shared} of {len(rows)} prompts were calibrated on; evaluate on held-out ones")
    if not unguarded.sees:
        rows = [row for row in rows if row.setting == "text"]
    return evaluate(
        unguarded, vlm, rows, max_new_tokens, batch_size, lambda done, total: tell("asking both models", done, total)
    )
